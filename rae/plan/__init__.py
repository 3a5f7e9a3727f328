"""What a run will take, from the run's own modules on tensors without data.

May import: config, survival, autoencoder, data, algorithms, callbacks, training.
"""

from rae.plan.report import Options, plan
from rae.plan.tables import show

__all__ = ["Options", "plan", "show"]
