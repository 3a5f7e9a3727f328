"""What a run will take, from the run's own modules on tensors without data.

May import: config, survival, autoencoder, data, algorithms, callbacks, training.
"""

from rae.plan.report import plan
from rae.plan.tables import show

__all__ = ["plan", "show"]
