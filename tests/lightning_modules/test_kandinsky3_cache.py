"""What training Kandinsky 3 holds: text of a cache at its own length in half precision, and networks in theirs."""

import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode

from datamodules.batches import collate
from datamodules.files.latents import Cache
from jobs.encode import encode
from jobs.run.config import load_config
from jobs.run.folder import build_data, build_module, use_cache
from jobs.train import train
from medsynth.errors import UserError
from tests.conftest import REPOSITORY
from tests.kandinsky3_folder import write_kandinsky3
from tests.lightning_modules.test_kandinsky3 import folder

__all__ = ["folder"]  # a fixture
TINY = REPOSITORY / "configs/tiny/kandinsky3.yaml"


def configured(folder: Path, phantom: Path, *settings: str):
    told = [f"model.pretrained={folder}", f"data.root={phantom}", "evaluation.images=0", "evaluation.grid=2"]
    return load_config([TINY], [*told, "checkpoint.monitor=val/loss", *settings])


@pytest.fixture(scope="module")
def cache(folder, phantom, tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("cache")
    encode(
        configured(folder, phantom, f"run_dir={base}/run", "data.prompt_dropout=0.3"), base / "latents", shard_rows=16
    )
    return base / "latents"


def test_a_cache_holds_each_text_at_its_own_length_in_half_precision(folder, phantom, cache):
    module = build_module(configured(folder, phantom))
    module.configure_model()
    tokens = 0
    for shard in cache.glob("text-*.safetensors"):
        with safe_open(shard, "pt") as kept:
            assert set(kept.keys()) == {"tokens", "ends"}
            assert kept.get_tensor("tokens").dtype == torch.float16
            tokens += len(kept.get_tensor("tokens"))
    text = Cache(cache).text()
    captions = build_data(configured(folder, phantom), module)[0].all_captions()
    assert "" in captions and len(captions) > 16, "more than one shard"
    lengths = {caption: len(module.text_encoder._ids(caption)) for caption in captions}
    assert tokens == sum(lengths.values()) and len(set(lengths.values())) > 5
    for some in (captions[:5], captions[-3:], [""], [captions[-1], "", captions[0]]):
        embeddings, mask = text(some)
        expected = module.embed(some)
        assert mask.sum(1).tolist() == [lengths[caption] for caption in some]
        assert torch.equal(mask, expected.mask)
        torch.testing.assert_close(embeddings.float(), expected.embeddings, rtol=2**-10, atol=1e-6)


def test_training_from_a_cache_holds_neither_encoder(folder, phantom, cache):
    """And has the losses and pictures of an uncached run, of texts of different lengths and of none."""
    modules, batches = [], []
    for latents in ("null", cache):
        config = configured(folder, phantom, f"data.latents={latents}", "data.prompt_dropout=0.3")
        module = build_module(config)
        torch.manual_seed(0)
        use_cache(config, module)
        module.configure_model()
        data, _ = build_data(config, module)
        modules.append(module.eval())
        training = data.training_set()
        batches.append(collate([training[i] for i in range(12)]))
        conditions = data.evaluation_conditions(2)
    whole, lean = modules
    assert lean.movq.encoder is None and not isinstance(lean.text_encoder, torch.nn.Module)
    plain, kept = batches
    assert kept.images is None and kept.text_embeddings.dtype == torch.float16
    lengths = kept.text_mask.sum(1)
    assert kept.text_mask.shape[1] == lengths.max() and 0 in lengths and len(lengths.unique()) > 3
    assert not kept.text_embeddings[~kept.text_mask].any()
    torch.testing.assert_close(lean.losses(kept)["loss"], whole.losses(plain)["loss"], rtol=1e-3, atol=0)
    exact = whole.condition(kept.conditions)  # the same text, but for its rounding to half precision
    rounded = replace(kept, text_embeddings=exact.embeddings, text_mask=exact.mask)
    torch.testing.assert_close(lean.losses(rounded)["loss"], whole.losses(plain)["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(lean.sample(conditions, [7, 8]), whole.sample(conditions, [7, 8]), rtol=0, atol=0.02)


def test_a_run_from_the_cache_in_mixed_precision(folder, phantom, cache, here):
    extra = [f"data.latents={cache}", "run_dir=run", "hardware.precision=bf16-mixed", "data.prompt_dropout=0.3"]
    trainer = train(configured(folder, phantom, *extra))
    assert trainer.global_step == 2
    dtypes = {(p.requires_grad, p.dtype) for p in trainer.lightning_module.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert list((here / "run/grids").glob("*.png")) and (here / "run/export/adapter_model.safetensors").is_file()


def test_the_text_encoder_stays_bfloat16_where_all_else_is_float16(folder, phantom):
    """As training on a GPU holds it: float16 overflows within a T5."""
    module = build_module(configured(folder, phantom))
    module.frozen_dtype = torch.float16
    module._trainer = SimpleNamespace(precision="16-mixed")
    module.setup("fit")
    assert {p.dtype for p in module.text_encoder.parameters()} == {torch.bfloat16}
    frozen = [p for network in (module.unet, module.movq) for p in network.parameters() if not p.requires_grad]
    assert {p.dtype for p in frozen} == {torch.float16}


def test_caches_of_others_are_refused(folder, phantom, cache, tmp_path):
    """Of another text encoder, another tokenizer, another method."""
    other = write_kandinsky3(tmp_path / "other", seed=8)
    for part, reason in (("text_encoder", "the text encoder has"), ("movq", "the picture encoder has")):
        mixed = shutil.copytree(folder, tmp_path / part)
        shutil.rmtree(mixed / part)
        shutil.copytree(other / part, mixed / part)
        config = configured(mixed, phantom, f"data.latents={cache}", "data.prompt_dropout=0.3")
        with pytest.raises(UserError, match=f"is stale: {reason} changed; encode into another folder"):
            build_data(config, build_module(config))
    words = shutil.copytree(folder, tmp_path / "words")
    (words / "tokenizer/spiece.model").write_bytes(b"other words")
    config = configured(words, phantom, f"data.latents={cache}", "data.prompt_dropout=0.3")
    with pytest.raises(UserError, match="is stale: the text encoder has changed"):
        build_data(config, build_module(config))
    decoder = REPOSITORY / "configs/tiny/kandinsky22_decoder.yaml"
    config = load_config([decoder], [f"data.root={phantom}", f"data.latents={cache}", "data.prompt_dropout=0.3"])
    with pytest.raises(UserError, match="is stale: the picture encoder has changed"):
        build_data(config, build_module(config))


class _Counted(TorchDispatchMode):
    """Bytes of what operations make that is there at once, at most.

    Weights that lie as they are in their file are none of it: the system reads them, and forgets them, as it likes.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        given |= {storage.data_ptr() for storage in args if isinstance(storage, torch.UntypedStorage)}
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given | {0}:
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size


def test_a_start_needs_little_more_than_the_weights_in_half_precision(folder, phantom, monkeypatch):
    """At most 1.2 times; a network of float32 that is brought to half precision then takes three times."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # other threads' tensors are not counted
    module = build_module(configured(folder, phantom, "model.adapter.rank=1"))
    module.frozen_dtype = torch.bfloat16
    with _Counted() as counted:
        module.configure_model()
    weights = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    assert 2 * weights <= counted.peak <= 1.2 * 2 * weights
    with _Counted() as counted:
        network = torch.nn.Linear(100, 100, bias=False).to(torch.bfloat16)
    assert (counted.peak, network.weight.dtype) == (3 * 2 * 100 * 100, torch.bfloat16)
