"""The policy: one module from a batch to the log-probabilities of its scored tokens."""

from torch import nn
from transformers import PreTrainedModel

from fastpref.data.batch import PreferenceBatch
from fastpref.model.attention import tree_keywords
from fastpref.model.head import Head
from fastpref.ops import TokenLogprobs


class Policy(nn.Module):
    """A model's body and head. Only the places that predict a scored token reach the head; logits never exist.

    It is what Accelerate prepares, so the hooks of data and model parallelism cover body and head together.
    """

    def __init__(self, backbone: nn.Module, head: Head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Policy":
        """The policy that shares the modules of `model`."""
        return cls(getattr(model, model.base_model_prefix), Head(model))

    def forward(self, batch: PreferenceBatch, outputs: tuple[str, ...] = ()) -> TokenLogprobs:
        """Log-probabilities, and the optional outputs of `linear_logprob`, of the N scored tokens."""
        layout = {"attention_mask": batch.attention_mask}
        if batch.tree is not None:
            layout = tree_keywords(batch.tree, batch.input_ids.device)
        hidden = self.backbone(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **layout
        ).last_hidden_state  # [B, T, H]
        return self.head(hidden.flatten(0, 1), batch.predictors, batch.targets, outputs)
