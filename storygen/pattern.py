"""The pattern a model learns: prompt, then outline, then story.

    <prompt>
      {prompt}
    <think>
      {outline}
    <story>
      {story}
    <eos>

Five tokens are added to the base tokenizer: the four tags, and the line break with its indent. The latter is an ordinary
token, not a special one. Without it a byte-level BPE would split "\\n  Once" as "\\n ", " Once", so a text that ends in the
open indent (as every generation prompt does) would end in pieces that no training row ever contained.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from storygen.batching import context_length
from storygen.cli import InputError

PROMPT, THINK, STORY, EOS = TAGS = ("<prompt>", "<think>", "<story>", "<eos>")
INDENT = "\n  "

# A user message becomes the text up to where the outline starts. Tags inside the message are broken up because a chat
# template is tokenised as one text, in which they would look like ours.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set text = message['content'] | trim"
    " | replace('<prompt>', '< prompt>') | replace('<think>', '< think>')"
    " | replace('<story>', '< story>') | replace('<eos>', '< eos>') %}"
    "{{ '<prompt>\\n  ' + text | replace('\\n', '\\n  ') + '\\n<think>\\n  ' }}"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Parsed:
    """A response taken apart. `verdict` is "ok" or the first reason why the grammar rejects it."""

    think: str
    story: str
    finished: bool
    verdict: str


def text_verdict(think: str, story: str, finished: bool) -> str:
    """The grammar's verdict on sections given as text: "ok" or a reason. A tag spelled out in a section counts as a tag."""
    text = think + "\n" + story
    if PROMPT in text:
        return "prompt_tag"
    if THINK in text:
        return "two_think_tags"
    if STORY in text:
        return "two_story_tags"
    if finished and EOS in text:
        return "text_after_eos"
    return _sections_verdict(think, story, finished)


def _sections_verdict(think: str, story: str, finished: bool) -> str:
    if not finished:
        return "no_eos"
    if not think.strip():
        return "empty_think"
    if not story.strip():
        return "empty_story"
    return "ok"


def add_pattern_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int = 64) -> None:
    """Add the pattern's tokens to a base model's vocabulary, in place. Does nothing if they are already there.

    A new token's row starts at the mean of the rows of its plain-text pieces (`<eos>` at the base's end-of-text row): random
    rows on tied embeddings dominate the softmax. The vocabulary grows to a multiple of `pad_to_multiple_of` for the matrix
    units; the spare rows, and the padding, start at the row that the base finds least likely. Started at the mean of all
    rows, some sixty of them together come up once in a dozen stories, and a few steps of fine-tuning do not unlearn it.
    """
    if all(tag in tokenizer.get_vocab() for tag in (*TAGS, INDENT)):
        return
    end = tokenizer.eos_token_id
    old_size = len(tokenizer)
    pieces = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in (*TAGS, INDENT)}
    if end is not None:
        pieces[EOS] = [end]
    tokenizer.add_special_tokens({"additional_special_tokens": [PROMPT, THINK, STORY], "eos_token": EOS})
    tokenizer.add_tokens([INDENT])
    # Padding needs an id that is never a target. The base's own end-of-text is free now: a row ends in <eos>.
    if tokenizer.pad_token is None or tokenizer.pad_token == EOS:
        if end is not None and end != tokenizer.eos_token_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
        else:
            tokenizer.add_special_tokens({"pad_token": "<pad>"})

    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
    with torch.no_grad():
        # The vocabulary's first tokens in a row are not text, but any hidden states show which tokens never follow.
        states = model.base_model(torch.arange(min(old_size, context_length(model)), device=model.device)[None])
        mean_state = states.last_hidden_state[0].mean(0)
        unlikely = int((model.get_output_embeddings().weight[:old_size] @ mean_state).argmin())
        # One matrix if input and output embeddings are tied, two otherwise.
        tables = {t.weight.data_ptr(): t.weight for t in (model.get_input_embeddings(), model.get_output_embeddings())}
        for table in tables.values():
            base_rows = table[:old_size].clone()
            table[old_size:] = base_rows[unlikely]
            table[tokenizer.pad_token_id] = base_rows[unlikely]
            for text, ids in pieces.items():
                table[tokenizer.convert_tokens_to_ids(text)] = base_rows[ids].mean(0)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.convert_tokens_to_ids(PROMPT)
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.do_sample = True
    tokenizer.model_max_length = context_length(model)
    tokenizer.chat_template = CHAT_TEMPLATE


class Pattern:
    """Builds and parses rows of token ids for one tokenizer that knows the pattern's tokens.

    Raises `InputError` for a tokenizer without them: its model has not been through `pattern_learning.py`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        vocabulary = tokenizer.get_vocab()
        missing = [repr(text) for text in (*TAGS, INDENT) if text not in vocabulary]
        if missing:
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path} has no {', '.join(missing)}: "
                "give a model made by pattern_learning.py"
            )
        self.tokenizer = tokenizer
        self.size = len(tokenizer)
        self.prompt_id, self.think_id, self.story_id, self.eos_id = (vocabulary[tag] for tag in TAGS)
        self.pad_id = tokenizer.pad_token_id

    def encode(self, content: str) -> list[int]:
        """One section's ids: each line on its own, indented. A tag inside the content is tokenised as plain text."""
        return self._encode_all([content])[0]

    def _encode_all(self, contents: list[str]) -> list[list[int]]:
        texts = [INDENT + INDENT.join(content.strip().splitlines()) + "\n" for content in contents]
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []

    def prefix(self, prompt: str) -> list[int]:
        """Ids of a prompt up to where the outline starts; what the chat template gives for a message without tags."""
        indent_id = self.tokenizer.convert_tokens_to_ids(INDENT)
        return [self.prompt_id, *self.encode(prompt), self.think_id, indent_id]

    def prefix_lengths(self, prompts: list[str]) -> list[int]:
        """Tokens of each prompt's `prefix`, tokenised together: one by one, 200,000 prompts take minutes."""
        return [len(ids) + 3 for ids in self._encode_all(prompts)]

    def row(self, prompt: str, think: str, story: str) -> tuple[list[int], int]:
        """Ids of a whole row, and the index of its first response token: outline, `<story>`, story and `<eos>` follow."""
        prefix = self.prefix(prompt)
        return [*prefix, *self.encode(think)[1:], self.story_id, *self.encode(story), self.eos_id], len(prefix)

    def fit(self, prompt: str, think: str, story: str, limit: int) -> tuple[list[int], int] | None:
        """`row` in at most `limit` tokens: sentences are cut from the story's end; None if over half of it would go."""
        ids, start = self.row(prompt, think, story)
        if len(ids) <= limit:
            return ids, start
        ends = [
            i for i in range(len(story) // 2, len(story)) if story[i - 1 : i + 1] in (". ", "! ", "? ", ".\n", '"\n', '" ')
        ]
        for end in reversed(ends):
            ids, start = self.row(prompt, think, story[:end])
            if len(ids) <= limit:
                return ids, start
        return None

    def paragraph(self, ids: list[int]) -> int:
        """Index where the first line of a section's ids begins, with its break and indent; 0 if none does."""
        indent_id = self.tokenizer.convert_tokens_to_ids(INDENT)
        return ids.index(indent_id) if indent_id in ids else 0

    def decode(self, ids: list[int]) -> str:
        """The text of one section, without its indent."""
        text = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.replace(INDENT, "\n").strip()

    def parse(self, response: list[int]) -> Parsed:
        """Split the ids after `prefix` at the tags' own ids; a tag that is spelled out in plain tokens is text like any other."""
        finished = self.eos_id in response
        end = response.index(self.eos_id) if finished else len(response)
        body = response[:end]
        split = body.index(self.story_id) if self.story_id in body else len(body)
        think, story = self.decode(body[:split]), self.decode(body[split + 1 :])
        if any(i >= self.size or i == self.pad_id for i in response):
            verdict = "stray_token"
        elif len(response) > end + 1:
            verdict = "text_after_eos"
        elif finished and split == len(body):
            verdict = "no_story"
        elif self.prompt_id in body:
            verdict = "prompt_tag"
        elif self.think_id in body:
            verdict = "two_think_tags"
        elif body.count(self.story_id) > 1:
            verdict = "two_story_tags"
        else:
            verdict = _sections_verdict(think, story, finished)
        return Parsed(think, story, finished, verdict)
