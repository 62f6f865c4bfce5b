"""A vocabulary that is larger than the tokenizer's: matrices whose sizes are multiples of 128 multiply faster."""

from transformers import AutoTokenizer, PreTrainedModel

from ..errors import ConfigError, DataError
from .arguments import ModelArguments


def pad_vocabulary(model_args: ModelArguments, tokenizer_name: str | None) -> None:
    """Give the model a `vocab_size` that is the tokenizer's length rounded up, where a flag asks for it.

    Args:
        model_args (`ModelArguments`): Its `config_overrides` get the `vocab_size`.
        tokenizer_name (`str`, *optional*): Name or folder of the tokenizer.

    Raises:
        ConfigError: There is no tokenizer to go by, or the model's vocabulary is given already.
        DataError: The tokenizer cannot be loaded.
    """
    multiple = model_args.pad_vocab_to_multiple_of
    if multiple is None:
        return
    flag = f"pad_vocab_to_multiple_of={multiple}"
    if multiple < 1:
        raise ConfigError(f"{flag} is out of range; use 1 or more, such as 128.")
    if model_args.model_name_or_path is not None:
        raise ConfigError(
            f"{flag} cannot change the vocabulary of the weights in model_name_or_path="
            f"{model_args.model_name_or_path!r}; leave it out."
        )
    if "vocab_size" in (model_args.config_overrides or ""):
        raise ConfigError(f"{flag} and vocab_size in config_overrides={model_args.config_overrides!r}: give one.")
    if tokenizer_name is None:
        raise ConfigError(f"{flag} rounds the size of a tokenizer up; name one with --tokenizer_name.")
    try:
        num_tokens = len(AutoTokenizer.from_pretrained(tokenizer_name))
    except (OSError, ValueError) as error:
        raise DataError(f"The tokenizer {tokenizer_name} cannot be loaded: {error}") from None
    padded = f"vocab_size={-(-num_tokens // multiple) * multiple}"
    model_args.config_overrides = ",".join(filter(None, [model_args.config_overrides, padded]))


def never_generate_padding(model: PreTrainedModel, num_tokens: int) -> None:
    """Let `generate` pass over the ids from `num_tokens` on, which no tokenizer can decode; exports say so too."""
    model.generation_config.suppress_tokens = list(range(num_tokens, model.config.vocab_size)) or None
