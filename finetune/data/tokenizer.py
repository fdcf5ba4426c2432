"""Sets up the tokenizer by the config: new tokens, end mark, padding, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune.keys import Config
from merge.errors import UsageError
from merge.schema.names import suggest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The format of OpenAI's chat markup, as the templates of Qwen and SmolLM write it.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def set_up_tokenizer(
    tokenizer: PreTrainedTokenizerBase, config: Config, folder: Path | None, writes: bool = True
) -> list[str]:
    """Adds tokens, the end and padding marks and the chat template that the config names; notes for the user.

    `writes`: the model will generate text, so it must learn to stop.

    Raises:
        UsageError: a token is not in the vocabulary, or there is neither an end mark nor a padding token.
    """
    notes = []
    known = tokenizer.get_vocab()
    there = [token for token in config.new_tokens if token in known]
    if there and not config.adapter:
        notes.append(f"new_tokens: {', '.join(there)} {'is' if len(there) == 1 else 'are'} in the vocabulary already")
    if config.new_tokens:
        tokenizer.add_tokens(list(config.new_tokens), special_tokens=False)
        known = tokenizer.get_vocab()
    for name in ("eos_token", "pad_token"):
        word = getattr(config, name)
        if word is not None:
            if word not in known:
                raise UsageError(
                    f'{name}: "{word}" is not in the vocabulary; {suggest(word, tokenizer.all_special_tokens)}. '
                    "Name a token it has, or add it: new_tokens."
                )
            setattr(tokenizer, name, word)
    if tokenizer.eos_token_id is None and tokenizer.pad_token_id is None:
        raise UsageError(
            "the tokenizer has neither an end mark nor a padding token: a tuned model would not learn to stop. "
            'Name one of its tokens, for example eos_token: "</s>", or add one with new_tokens.'
        )
    if tokenizer.eos_token_id is None and writes:
        notes.append(
            "the tokenizer has no end mark, so examples end without one and a tuned model does not learn to stop"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(
            f'the tokenizer has no padding token; rows are filled with "{tokenizer.eos_token}", which is masked'
        )
    if config.chat_template is not None:
        tokenizer.chat_template = _template(config.chat_template, folder)
    return notes


def _template(text: str, folder: Path | None) -> str:
    if text == "chatml":
        return CHATML
    path = Path(text).expanduser()
    if not path.is_file() and folder is not None:
        path = folder / path
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f'chat_template "{text}": neither chatml nor a file that can be read ({error}).') from None
