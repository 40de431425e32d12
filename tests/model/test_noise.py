"""Noise on the embeddings of training passes (NEFTune)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.neftune import neftune_post_forward_hook

from fastpref.data.batch import PreferenceBatch, collate, collate_after, following
from fastpref.data.example import Example, Origin
from fastpref.errors import UserError
from fastpref.model.load import Loaded, load_model
from fastpref.step.reference import make_reference
from tests.support.tiny import SIZES, config_for, examples, save_model

CPU = torch.device("cpu")
ALPHA, WIDTH = 5.0, SIZES["hidden_size"]
PAIR = Example(list(range(3, 11)), ([11, 12, 13], [14, 15, 16, 17, 18]), None, Origin("a row"))  # 8 tokens, 3 and 5


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("llama"))


def loaded(folder: Path, *overrides: str) -> Loaded:
    return load_model(config_for(folder, f"train.neftune_alpha={ALPHA}", *overrides), CPU)


def noise(model: Loaded, batch: PreferenceBatch) -> Tensor:
    """Return the noise of a pass in the policy's mode, [B, T, H]."""
    seen: list[Tensor] = []
    embeddings: Any = model.model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        with torch.no_grad():
            model.policy.hidden_states(batch)
            embeddings.eval()(batch.input_ids)
    finally:
        handle.remove()
        embeddings.train(model.policy.training)
    return seen[0] - seen[1]


LENGTHS: dict[str, list[list[int]]] = {  # of the sequence of each token: one row, or a row a sequence
    "tree": [[13] * 8 + [11] * 3 + [13] * 5],  # a prompt is shared, and the longer sequence counts
    "packed": [[11] * 11 + [13] * 13],
    "padded": [[11] * 13, [13] * 13],  # with two tokens of padding
}


@pytest.mark.parametrize("layout", LENGTHS)
def test_noise_is_as_large_as_the_sequence_is_long(llama: Path, layout: Any):
    """Every number is uniform between ±α/√(L·d) of its token."""
    model = loaded(llama)
    model.policy.train()
    most = ALPHA / (torch.tensor(LENGTHS[layout]).float() * WIDTH).sqrt()
    shares = torch.cat([noise(model, collate([PAIR], layout)) / most[..., None] for _ in range(20)])
    assert 0.999 < shares.abs().max() <= 1.0001
    assert shares.mean().abs() < 0.02
    assert shares.var() == pytest.approx(1 / 3, rel=0.03)
    assert (shares.abs().amax((0, 2)) > 0.9).all()  # at every token


def test_completions_that_follow_a_row(llama: Path):
    """The length of a mismatched completion's sequence includes the prompt that it follows."""
    batch = collate([PAIR], "tree")
    later = collate_after(batch, [Example(PAIR.prompt, ([7] * 4,), None, Origin("another"))])
    assert following(later, {}).tree.longest().tolist() == [12.0] * later.input_ids.numel()  # pyright: ignore[reportOptionalMemberAccess]


def test_rows_of_one_length_equal_those_of_transformers(llama: Path):
    """In padded rows without padding the same random numbers give the same noise as the hook of transformers."""
    batch = collate([Example(PAIR.prompt, ([9, 8, 7], [6, 5, 4]), None, Origin("a row"))], "padded")
    model = loaded(llama)
    model.policy.train()
    torch.manual_seed(7)
    own = noise(model, batch)
    embeddings: Any = torch.nn.Embedding.from_pretrained(model.model.get_input_embeddings().weight)
    embeddings.neftune_noise_alpha = ALPHA
    torch.manual_seed(7)
    theirs = neftune_post_forward_hook(embeddings.train(), None, embeddings(batch.input_ids))
    torch.testing.assert_close(own, theirs - embeddings(batch.input_ids), rtol=0, atol=1e-6)


@pytest.mark.parametrize("overrides", [[], ["lora={rank=2}"], ["reference.mode=copy"]], ids=["full", "LoRA", "copy"])
@pytest.mark.parametrize("layout", ["tree", "packed", "padded"])
def test_only_the_policy_in_training_has_noise(llama: Path, layout: Any, overrides: list[str]):
    """The reference and evaluations compute what they do without noise; two training passes differ."""
    model, quiet = loaded(llama, *overrides), load_model(config_for(llama, *overrides), CPU)
    batch = collate(examples(3), layout)
    expected = quiet.policy(batch).logp
    assert torch.equal(model.policy.eval()(batch).logp, expected)
    reference, _ = make_reference(config_for(llama, *overrides), model)
    first, second = (model.policy.train()(batch).logp for _ in range(2))
    assert torch.equal(reference(batch), expected)
    assert model.policy.training
    assert (first - expected).abs().max() > 1e-3
    assert (first - second).abs().max() > 1e-3


def test_a_model_that_reads_its_embeddings_otherwise(llama: Path, monkeypatch: pytest.MonkeyPatch):
    """Noise that would not be added is refused before training."""

    def forward(self: Any, input_ids: Tensor | None = None, **options: Any) -> Any:
        assert input_ids is not None
        options["inputs_embeds"] = torch.nn.functional.embedding(input_ids, self.embed_tokens.weight)
        return plain(self, **options)

    from transformers import LlamaModel

    plain = LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", forward)
    with pytest.raises(UserError, match=r"train\.neftune_alpha: the code of llama models does not call its embeddings"):
        loaded(llama)
