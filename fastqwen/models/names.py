"""What a checkpoint calls the parts of a decoder. A tuple is joined into one matrix, in its order."""

from __future__ import annotations

import re

import msgspec


class Names(msgspec.Struct, frozen=True, kw_only=True):
    embed: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    classifier: str = "score"
    other_prefixes: tuple[str, ...] = ()  # of models with a vision part, in place of ``model.``
    layer: str = "model.layers.{layer}."  # prefix of all that follow
    attention_norm: str = "input_layernorm"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate_up: tuple[str, str] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    expert_gate_up: tuple[str, str] = ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj")
    expert_down: str = "mlp.experts.{expert}.down_proj"
    shared_gate_up: tuple[str, str] = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    shared_down: str = "mlp.shared_expert.down_proj"
    shared_gate: str = "mlp.shared_expert_gate"
    # A gated delta rule's: what makes q, k, v together, z, b and a; or q, k, v, z of each key head in turn, and b, a.
    delta_in: tuple[str, ...] = ()
    delta_conv: tuple[str, ...] = ()
    delta_decay: tuple[str, ...] = ()  # tensors without a module of their own
    delta_norm: tuple[str, ...] = ()
    delta_out: tuple[str, ...] = ()

    def holds(self, tensor: str, num_layers: int) -> bool:
        """Whether a tensor belongs to a part of a decoder of so many layers, under these names or their variants."""
        module = tensor.rpartition(".")[0]
        return any(names._of_module(module, num_layers) for names in self.variants())

    def multiplies(self, tensor: str, num_layers: int) -> bool:
        """Whether it belongs to a matrix that something is multiplied by: a bias of zeros would add nothing to it."""
        module = tensor.rpartition(".")[0]
        norms = (self.final_norm, self.attention_norm, self.mlp_norm, self.q_norm, self.k_norm, *self.delta_norm)
        others = (self.embed, *norms, *self.delta_conv)
        ends_otherwise = f".{module}".endswith(tuple(f".{name.removeprefix('model.')}" for name in others))
        return self.holds(tensor, num_layers) and not ends_otherwise

    def _of_module(self, module: str, num_layers: int) -> bool:
        if module in (self.embed, self.final_norm, self.head):
            return True
        layer = re.fullmatch(re.escape(self.layer).replace(r"\{layer\}", r"(\d+)") + "(.+)", module)
        if layer is None or int(layer[1]) >= num_layers:
            return False
        return re.sub(r"\.experts\.\d+\.", ".experts.{expert}.", layer[2]) in self._of_layer()

    def variants(self) -> tuple[Names, ...]:
        """The same parts under each prefix that checkpoints are known to have."""
        return (self, self.without_prefix(), *map(self._under, self.other_prefixes))

    def _of_layer(self) -> set[str]:
        names = [getattr(self, field) for field in self.__struct_fields__ if field not in NOT_OF_LAYER]
        return {one for name in names for one in (name if isinstance(name, tuple) else (name,))}

    def without_prefix(self) -> Names:
        """As in a checkpoint that was saved without its head, such as Qwen3-Embedding: no ``model.`` in front."""
        return self._under("")

    def _under(self, prefix: str) -> Names:
        tops = {name: prefix + getattr(self, name).partition(".")[2] for name in ("embed", "final_norm", "layer")}
        return msgspec.structs.replace(self, **tops)


NOT_OF_LAYER = ("embed", "final_norm", "head", "classifier", "layer", "other_prefixes")

HYBRID_NAMES = Names(
    other_prefixes=("model.language_model.", "language_model.model."),
    delta_in=(
        "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b", "linear_attn.in_proj_a",
    ),
    delta_conv=("linear_attn.conv1d",),
    delta_decay=("linear_attn.A_log", "linear_attn.dt_bias"),
    delta_norm=("linear_attn.norm",),
    delta_out=("linear_attn.out_proj",),
)  # fmt: skip
