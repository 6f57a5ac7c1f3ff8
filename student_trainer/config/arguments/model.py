"""The flags of the model and of its LoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from student_trainer.config.flags import flag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model and its tokenizer, in memory already."""

    model: Any
    tokenizer: PreTrainedTokenizerBase


@dataclass
class ModelArguments:
    """The model, and its tokenizer.

    ``loaded`` is not a flag: a Python caller may set a loaded model in place of a name.
    """

    model_name_or_path: str = flag(
        "",
        "Folder (LoRA adapters are merged into their base) or Hugging Face Hub id.",
        group="model",
        common=True,
        resume="told",
        private=True,
    )
    model_revision: str = flag(
        "main", "Branch, tag or commit on the Hub.", group="model", resume="told"
    )
    torch_dtype: Literal["auto", "checkpoint", "float32", "bfloat16", "float16"] = flag(
        "auto",
        "Dtype of the weights. auto: bfloat16 on a GPU that has it; float32 elsewhere, and with "
        "--bf16 or --fp16, which compute in that and keep float32 weights; a resumed run keeps its "
        "own. checkpoint: as stored (transformers' auto).",
        aliases=("--dtype",),
        group="model",
        common=True,
        resume="told",
    )
    trust_remote_code: bool = flag(
        False, "Run model code that comes with the checkpoint.", group="model"
    )
    eos_token: str | None = flag(
        None,
        "Token that ends a completion, where the chat template ends turns with another one.",
        group="model",
        resume="same",
    )
    chat_template: str | None = flag(
        None,
        "File with a chat template (Jinja), in the place of the tokenizer's own.",
        group="chat template",
        resume="told",
    )
    attn_implementation: str | None = flag(
        None, "eager, sdpa, flash_attention_2, …", group="model", resume="told"
    )
    loaded: LoadedModel | None = field(default=None, init=False)


@dataclass
class AdapterArguments:
    """The training of LoRA or QLoRA adapters instead of all weights."""

    use_peft: bool = flag(
        False,
        "Train LoRA adapters instead of all weights.",
        group="LoRA",
        common=True,
        resume="same",
    )
    lora_r: int = flag(
        16, "Rank of the adapters.", group="LoRA", resume="same", needs=("use_peft", True)
    )
    lora_alpha: int | None = flag(
        None,
        "Scale of the adapters: alpha / r. Default: twice --lora_r, so that another rank keeps the "
        "scale, and with it the learning rate.",
        group="LoRA",
        resume="same",
        needs=("use_peft", True),
    )
    lora_dropout: float = flag(
        0.0, "Dropout before the adapters.", group="LoRA", resume="told", needs=("use_peft", True)
    )
    lora_target_modules: list[str] | None = flag(
        None,
        "Modules to adapt; default all linear layers but the output layer.",
        group="LoRA",
        resume="same",
        needs=("use_peft", True),
    )
    load_in_4bit: bool = flag(
        False,
        "QLoRA: NF4 base weights (needs a GPU and bitsandbytes).",
        group="LoRA",
        resume="same",
    )

    @property
    def alpha(self) -> int:
        """The value of ``lora_alpha``, or its default for this rank."""
        return 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha
