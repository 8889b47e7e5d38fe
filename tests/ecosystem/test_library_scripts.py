"""The rows of docs/scripts.md that need other libraries, run with tiny models."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from einconv_kfac import KFAC

VOCABULARY = 50
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for nothing on a network, and let libraries skip a torchvision of another build."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


def transformers() -> Any:
    """Return the library."""
    return pytest.importorskip("transformers")


def tokens(size: int = 6) -> Tensor:
    return torch.randint(VOCABULARY, (size, 9), generator=torch.Generator().manual_seed(1))


def gpt2(library: Any) -> Any:
    config = library.GPT2Config(
        vocab_size=VOCABULARY, n_positions=16, n_embd=16, n_layer=2, n_head=2,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return library.GPT2LMHeadModel(config)


def models(library: Any) -> dict[str, tuple[Any, dict[str, Tensor]]]:
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text, wide = tokens(), {**small, "intermediate_size": 32}
    labels = text.where(torch.rand(text.shape) < 0.5, -100)
    classes = torch.arange(6) % 3
    llama = library.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=1, **wide)
    bert = library.BertConfig(vocab_size=VOCABULARY, num_labels=3, **wide)
    vit = library.ViTConfig(image_size=8, patch_size=4, num_labels=3, **wide)
    t5 = library.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return {
        "gpt2": (gpt2(library), {"input_ids": text, "labels": text}),
        "llama": (library.LlamaForCausalLM(llama), {"input_ids": text, "labels": text}),
        "bert": (library.BertForMaskedLM(bert), {"input_ids": text, "labels": labels}),
        "bert classes": (
            library.BertForSequenceClassification(bert),
            {"input_ids": text, "labels": classes},
        ),
        "vit": (
            library.ViTForImageClassification(vit),
            {"pixel_values": torch.randn(6, 3, 8, 8), "labels": classes},
        ),
        "t5": (
            library.T5ForConditionalGeneration(t5),
            {"input_ids": text, "labels": text},
        ),
    }


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "bert classes", "vit", "t5"])
def test_a_hugging_face_model(name: str) -> None:
    model, batch = models(transformers())[name]
    opt, losses = KFAC(model.train()), []
    for _ in range(20):
        opt.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        opt.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_the_loss_in_the_output_is_the_plain_script() -> None:
    """In float64 the steps are those of the scores with a loss module on them."""

    class Scores(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, text: Tensor) -> Tensor:
            scores: Tensor = self.model(input_ids=text).logits
            return scores[:, :-1].transpose(1, 2)

    library, text, ends = transformers(), tokens(), []
    for plain in (False, True):
        torch.manual_seed(0)
        model, loss_fn = gpt2(library).double().train(), nn.CrossEntropyLoss()
        whole = Scores(model)
        options = {"fisher": "forward-only", "exclude": "*wte*"}
        opt = KFAC(whole, loss_fn, **options) if plain else KFAC(model, **options)
        for _ in range(6):
            opt.zero_grad()
            if plain:
                loss = loss_fn(whole(text), text[:, 1:])
            else:
                loss = model(input_ids=text, labels=text).loss
            loss.backward()
            opt.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)


class Texts(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        own = tokens(24)[index]
        return {"input_ids": own, "labels": own}


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "bf16": True}])
def test_transformers_trainer(options: dict[str, Any], tmp_path: Path) -> None:
    library = transformers()
    pytest.importorskip("accelerate")
    model = gpt2(library)
    opt = KFAC(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0)
    arguments = library.TrainingArguments(
        str(tmp_path), num_train_epochs=6, per_device_train_batch_size=4, report_to=[],
        logging_steps=3, use_cpu=True, disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip
    trainer = library.Trainer(model, arguments, train_dataset=Texts(), optimizers=(opt, scheduler))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1


def table() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, generator=generator)
    return x, (x @ torch.randn(5, 3, generator=generator)).argmax(1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.parametrize(
    ("manual", "precision"), [(False, "32-true"), (True, "32-true"), (False, "bf16-mixed")]
)
def test_lightning(manual: bool, precision: str) -> None:
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net, self.loss_fn = net(), nn.CrossEntropyLoss()
            self.automatic_optimization = not manual
            self.losses: list[float] = []

        def training_step(self, batch: Any, _: int) -> Tensor:
            loss: Tensor = self.loss_fn(self.net(batch[0]), batch[1])
            if manual:
                opt = self.optimizers()
                opt.zero_grad()
                self.manual_backward(loss)
                opt.step()
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> KFAC:
            return KFAC(self.net, self.loss_fn)

    class Clipping(Lit):
        """In mixed precision, Lightning itself does not clip for optimizers of scaled gradients."""

        def configure_gradient_clipping(
            self, optimizer: KFAC, gradient_clip_val: float, gradient_clip_algorithm: str | None
        ) -> None:
            nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)

    model = Lit() if precision == "32-true" else Clipping()
    trainer = lightning.Trainer(
        max_epochs=5, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", precision=precision,
        gradient_clip_val=None if manual else 0.5,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(*table()), batch_size=32))
    assert model.losses[-1] < 0.5 * model.losses[0]


def test_accelerate() -> None:
    library = pytest.importorskip("accelerate")
    accelerator = library.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, loss_fn = net(), nn.CrossEntropyLoss()
    opt, losses = KFAC(model, loss_fn), []
    loader = DataLoader(TensorDataset(*table()), batch_size=32)
    model, opt, loader = accelerator.prepare(model, opt, loader)
    for _ in range(8):
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = loss_fn(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                opt.zero_grad()
                losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_peft() -> None:
    base, library = transformers(), pytest.importorskip("peft")
    config = library.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    model = library.get_peft_model(gpt2(base), config)
    opt, losses, text = KFAC(model), [], tokens(8)
    for _ in range(20):
        opt.zero_grad()
        loss = model(input_ids=text, labels=text).loss
        loss.backward()
        opt.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.05
    assert set(opt.coverage().values()) == {"kfac", "frozen"}


@pytest.mark.parametrize("observed", [False, True])
def test_fastai(observed: bool) -> None:
    core, data = pytest.importorskip("fastai.callback.core"), import_module("fastai.data.core")
    learner, wrapper = import_module("fastai.learner"), import_module("fastai.optimizer")
    load, losses = import_module("fastai.data.load"), import_module("fastai.losses")
    import_module("fastai.callback.progress")  # adds `no_bar` to Learner
    model, loss_func, (x, y) = net(), losses.CrossEntropyLossFlat(), table()

    class Observed(core.Callback):  # type: ignore[misc, name-defined]
        def after_loss(self) -> None:
            if self.training:
                self.learn.loss_grad = opt.observe(self.learn.loss_grad)

    opt = KFAC(model) if observed else KFAC(model, loss_func.func)
    loader = load.DataLoader(list(zip(x, y)), bs=16)
    learn = learner.Learner(
        data.DataLoaders(loader, loader), model, loss_func,
        opt_func=wrapper.OptimWrapper(opt=opt), cbs=[Observed()] * observed,
    )  # fmt: skip
    with learn.no_bar(), learn.no_logging():
        learn.fit(5, lr=1)
    assert loss_func(model(x), y) < 0.5


def test_deepxde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDE_BACKEND", "pytorch")
    library = pytest.importorskip("deepxde")
    library.config.set_random_seed(0)
    interval = library.geometry.Interval(-1, 1)

    def residual(x: Tensor, u: Tensor) -> Tensor:
        found: Tensor = library.grad.hessian(u, x)
        return found + torch.pi**2 * torch.sin(torch.pi * x)

    ends = library.icbc.DirichletBC(interval, lambda _: 0, lambda _, is_end: is_end)
    problem = library.data.PDE(interval, residual, ends, 16, 2)
    model = library.Model(problem, library.nn.FNN([1, 20, 20, 1], "tanh", "Glorot uniform"))
    opt = KFAC(model.net)
    model.compile(opt)

    def train_step(*batch: Any) -> None:
        opt.zero_grad()
        opt.observe(model.outputs_losses_train(*batch)[1].sum()).backward()
        opt.step()

    model.train_step = train_step
    history, _ = model.train(iterations=20, display_every=20, verbose=0)
    assert sum(history.loss_train[-1]) < sum(history.loss_train[0]) / 100


def test_pytorch_geometric() -> None:
    library = pytest.importorskip("torch_geometric")

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = library.nn.GCNConv(5, 16), library.nn.GCNConv(16, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            found: Tensor = self.b(self.a(x, edges).relu(), edges)
            return found

    model, (x, y) = Graph(), table()
    edges, mask = torch.randint(64, (2, 100)), torch.rand(64) < 0.7
    opt, losses = KFAC(model), []
    for _ in range(20):
        opt.zero_grad()
        loss = opt.observe(functional.cross_entropy(model(x, edges)[mask], y[mask]))
        loss.backward()
        opt.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("name", "arguments", "reached"),
    [
        ("with_accelerate", (3,), 0.9),
        ("with_lightning", (4,), 0.9),
        ("with_transformers", (["--steps", "25", "--sums", "500"],), 0.3),
    ],
)
def test_an_example(name: str, arguments: tuple[Any, ...], reached: float) -> None:
    transformers()
    pytest.importorskip(name.removeprefix("with_"))
    assert import_module(name).main(*arguments) > reached
