"""The policy's head gives the log-probabilities and gradients of the model's own logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fastpref
from fastpref.data.batch import collate
from fastpref.errors import UserError
from fastpref.kernels import linear_logprob_torch
from fastpref.kernels.head_weight import FourBitWeight
from fastpref.model import precision
from fastpref.model.body import body_of
from fastpref.model.head import Head, OwnLogits, check_logits
from fastpref.model.load import Loaded, load_model
from fastpref.model.policy import Policy
from tests.support.paths import QUICKSTART, QUICKSTART_MODEL
from tests.support.tiny import VOCABULARY, config_for, examples, save_model

CPU = torch.device("cpu")
ON_HEAD = 'lora={rank=2, target=["q_proj", "lm_head"]}'


def adapted(kind: str, folder: Path, override: str = ON_HEAD) -> Loaded:
    """Return a model whose adapters are not zero."""
    loaded = load_model(config_for(save_model(kind, folder), override), CPU)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in loaded.policy.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    return loaded


def both_ways(loaded: Loaded) -> list[tuple[Tensor, list[Tensor]]]:
    """Return a padded batch's log-probabilities and gradients: by our head, then by full logits."""
    batch = collate(examples(4), "padded")
    trained = [p for p in loaded.policy.parameters() if p.requires_grad]
    logits = loaded.wrapped(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = logits.flatten(0, 1)[batch.predictors].double().log_softmax(-1)
    ways = loaded.policy(batch).logp, logps.gather(1, batch.targets[:, None])[:, 0]
    grads = [torch.autograd.grad((logp * torch.linspace(-1, 1, len(logp))).sum(), trained) for logp in ways]
    return [(logp.detach().float(), list(own)) for logp, own in zip(ways, grads, strict=True)]


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma2", "cohere"])
def test_an_adapter_on_the_head(kind: str, tmp_path: Path):
    """With LoRA on lm_head (tied, with softcap or scale), values and gradients are those of full logits."""
    loaded = adapted(kind, tmp_path)
    ours, theirs = both_ways(loaded)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-3, atol=1e-4)
    on_head = [name for name, p in loaded.policy.named_parameters() if p.requires_grad and "head" in name]
    assert len(on_head) == 2


def test_the_reference_has_no_adapter_on_its_head(tmp_path: Path):
    """With adapters disabled, the head is the plain weight again."""
    loaded = adapted("llama", tmp_path)
    assert isinstance(loaded.wrapped, PeftModel)
    head = loaded.policy.head
    assert isinstance(head, Head)
    with loaded.wrapped.disable_adapter():
        assert isinstance(head.weight_and_bias()[0], Tensor)
    assert not isinstance(head.weight_and_bias()[0], Tensor)


def test_a_head_of_four_bits(tmp_path: Path):
    """A 4-bit head gives the log-probabilities of its dequantised weight."""
    model = AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path))
    plain = torch.nn.Linear(64, VOCABULARY, bias=False)
    quantized = Linear4bit(64, VOCABULARY, bias=False, quant_type="nf4", quant_storage=torch.uint8)
    quantized.load_state_dict(plain.state_dict())
    model.lm_head = quantized.to("cpu")
    head = Head(model)
    weight: Any = head.weight_and_bias(torch.float32)[0]
    assert isinstance(weight, FourBitWeight)
    assert head.vocabulary == VOCABULARY
    hidden, targets = torch.randn(5, 64), torch.arange(5)
    expected = (hidden @ weight.rows(0, VOCABULARY).T).log_softmax(-1)[range(5), range(5)]
    torch.testing.assert_close(head(hidden, torch.arange(5), targets).logp, expected)


def test_variants_of_lora_on_the_head_are_refused(tmp_path: Path):
    """DoRA on the head is refused, because the kernels do not compute it."""
    model = AutoModelForCausalLM.from_pretrained(save_model("llama", tmp_path))
    get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], use_dora=True))
    with pytest.raises(UserError, match="variant of LoRA"):
        Head(model).weight_and_bias()


def test_training_with_an_adapter_on_the_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run with LoRA on the head learns, and its adapter, which contains no whole head, can be loaded by PEFT."""
    monkeypatch.chdir(tmp_path)
    result = fastpref.train(QUICKSTART, ['lora.target=["q_proj", "v_proj", "lm_head"]', "train.steps=12"])
    assert result.eval_metrics["eval/rewards/margins"] > 0.01
    saved = result.output_dir / "final"
    assert (saved / "adapter_model.safetensors").stat().st_size < 1_000_000
    base = AutoModelForCausalLM.from_pretrained(QUICKSTART_MODEL)
    loaded = PeftModel.from_pretrained(base, str(saved))
    assert any("lm_head" in name and p.abs().sum() > 0 for name, p in loaded.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_named(number: float, tmp_path: Path):
    path = save_model("llama", tmp_path) / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = number
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"NaN.*model\.layers\.1\.mlp\.up_proj\.weight holds numbers that are not"):
        load_model(config_for(tmp_path), torch.device("cpu"))


LOGITS = {"small": 5.0, "as GPT-2's": 150.0, "huge": 3000.0}  # the largest logit


@pytest.mark.parametrize("memory", ["float32 fits", "float32 does not fit"])
@pytest.mark.parametrize("size", LOGITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["llama", "cohere", "gemma2"])
def test_large_logits_are_compared_by_their_spacing(
    kind: str, dtype: torch.dtype, size: str, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A head that computes what the model computes is accepted however large its logits are, in every dtype; one with
    another scale or softcap is refused."""
    if memory != "float32 fits":
        monkeypatch.setattr(precision, "_free", lambda model: -1)
    path = save_model(kind, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, tie_word_embeddings=False).eval()
    embeddings: Any = model.get_output_embeddings()
    with torch.no_grad():
        embeddings.weight = nn.Parameter(embeddings.weight.clone())  # of a head that is tied
        largest = model(torch.arange(4)[None]).logits.abs().max()
        embeddings.weight.mul_(LOGITS[size] / largest)
    model = model.to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    body = body_of(model)
    head = Head(model)
    check_logits(model, body, head)
    check_logits(model, body, OwnLogits(model, body))
    name = "scale" if head.settings.softcap is None else "softcap"
    head.settings = replace(head.settings, **{name: 1.25 * getattr(head.settings, name)})
    with pytest.raises(UserError, match="change their logits in a way this version does not know"):
        check_logits(model, body, head)
    assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize("own", [False, True], ids=["fused head", "own logits"])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma2", "cohere"])
def test_full_fine_tuning_multiplies_as_autocast_does(
    kind: str, own: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With float32 weights under autocast, the head multiplies rows and weights of autocast's dtype, and values and
    gradients are those of the model's own head; the gradient of the weight is float32."""
    loaded = load_model(config_for(save_model(kind, tmp_path)), CPU)
    policy = Policy.of(loaded.model, own_logits=own)
    seen, walk = [], linear_logprob_torch.walk_vocabulary

    def watched(hidden: Tensor, weight: Any, *args: Any, **options: Any) -> Any:
        seen.append((hidden.dtype, weight.rows(0, 5).dtype))
        return walk(hidden, weight, *args, **options)

    monkeypatch.setattr(linear_logprob_torch, "walk_vocabulary", watched)
    batch = collate(examples(4), "padded")
    trained = list(policy.parameters())
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        ours = policy(batch).logp
        logits = loaded.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        hidden = policy.backbone(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    assert logits.dtype == torch.bfloat16
    assert hidden.dtype == torch.float32
    theirs = logits.flatten(0, 1)[batch.predictors].float().log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    assert seen == ([] if own else [(torch.bfloat16, torch.bfloat16)])
    assert (ours - theirs).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * logits.abs().max()
    weights = torch.linspace(-1, 1, len(ours))
    for a, b in zip(*(torch.autograd.grad((logp * weights).sum(), trained) for logp in (ours, theirs)), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 0.05 * b.norm()
