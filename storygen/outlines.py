"""The teacher: asks any OpenAI-compatible endpoint for the outline that a story could have been written from."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from storygen.cli import InputError

MIN_WORDS, MAX_WORDS = 15, 200
COPY_RUN, MAX_COPIED = 8, 0.2
MAX_ANSWER_TOKENS = 2048
REASONING = re.compile(r"<think(?:ing)?>.*?(?:</think(?:ing)?>|\Z)|\A.*</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
# Of an outline that comes in a file: a tag further on is its writer's own text.
LEADING_REASONING = re.compile(r"\A\s*<think(?:ing)?>.*?</think(?:ing)?>\s*(\S.*)\Z", re.DOTALL | re.IGNORECASE)
REFUSAL = re.compile(
    r"\A\W*(?:i(?:'m| am) (?:sorry|unable|not able)|sorry\b|i (?:can(?:'t|not)|won't|will not)\b|as an ai\b|i apologi[sz]e"
    r"|unfortunately,? i\b)",
    re.IGNORECASE,
)
# An outline in a file may be told by an "I" that cannot do something: there, a refusal also names what was asked.
DECLINED = re.compile(
    rf"(?:{REFUSAL.pattern})(?=.{{0,160}}\b(?:help|assist|request|generate|comply|fulfil\w*|provide|write|as an ai|language model)\b)",
    re.IGNORECASE | re.DOTALL,
)


@dataclass(frozen=True)
class Teacher:
    """Where to ask and how. The API key comes only from OPENAI_API_KEY and is never written anywhere.

    url: base of the endpoint, up to `/v1`. template: the question, with `{prompt}` and `{story}` in it. cache: jsonl file of
    answers, appended to. concurrency: requests in flight at once. retries: the client's, with backoff. timeout: seconds.
    """

    url: str
    model: str
    template: str
    cache: Path
    concurrency: int = 8
    retries: int = 5
    timeout: float = 120.0

    def key(self, row: dict) -> str:
        """Hash of all that an answer depends on: the same row is never paid for twice, a changed question is asked again."""
        parts = [self.template, row["prompt"], row["story"], self.model]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def question(self, row: dict) -> str:
        """The template filled in one pass: a story that contains "{prompt}" stays as it is."""
        return re.sub(r"\{(prompt|story)\}", lambda match: row[match[1]], self.template)


def ask(rows: list[dict], teacher: Teacher, progress: Callable[[], None] = lambda: None) -> tuple[list[str | None], Counter]:
    """(outline of each row or None, counts of `from_cache` and of why outlines are missing) for rows {prompt, story}.

    Every answer is on disk before the next is awaited, so a stopped run resumes where it was. `progress` is called once per
    row. Raises `InputError` for a missing client, a wrong key or model, or an endpoint that answers nothing.
    """
    try:
        import openai
    except ImportError:
        raise InputError("a teacher needs the openai client: pip install 'story-gen[teacher]'") from None

    answers, counts = _read_cache(teacher.cache), Counter()
    asked = {teacher.key(row): row for row in rows}
    missing = {key: row for key, row in asked.items() if key not in answers}
    counts["from_cache"] = len(asked) - len(missing)
    for _ in range(len(rows) - len(missing)):
        progress()
    if missing:
        try:
            client = openai.OpenAI(
                base_url=teacher.url,
                # Local servers take any key, but the client insists on one.
                api_key=os.environ.get("OPENAI_API_KEY") or "none",
                max_retries=teacher.retries,
                timeout=teacher.timeout,
            )
        except Exception as error:  # noqa: BLE001  the client's and its HTTP library's own, for what is no address
            raise InputError(f"--teacher-url {teacher.url}: {_first_line(error)}") from None

        def answer(row: dict) -> str | None:
            """What the teacher said, "" if that is nothing whole; None if the endpoint sent no chat completion at all."""
            messages = [{"role": "user", "content": teacher.question(row)}]
            try:
                reply = client.chat.completions.create(
                    model=teacher.model, messages=messages, temperature=0.7, max_tokens=MAX_ANSWER_TOKENS
                )
                choice = reply.choices[0]
                return "" if choice.finish_reason == "length" else choice.message.content or ""
            except (ValueError, TypeError, AttributeError, LookupError):
                return None

        def silent(error: openai.APIConnectionError) -> InputError:
            return InputError(
                f"teacher {teacher.url} does not answer ({_first_line(error)}); "
                f"{len(answers)} answers are kept in {teacher.cache}, run again to go on"
            )

        if teacher.cache.is_dir():
            raise InputError(f"--teacher-cache {teacher.cache} is a folder: name a file")
        teacher.cache.parent.mkdir(parents=True, exist_ok=True)
        pool, known = ThreadPoolExecutor(teacher.concurrency), len(answers)
        try:
            with client, open(teacher.cache, "a", encoding="utf-8") as cache:
                if cache.tell() and not _ends_a_line(teacher.cache):
                    cache.write("\n")
                futures = {pool.submit(answer, row): key for key, row in missing.items()}
                for future in as_completed(futures):
                    try:
                        text = future.result()
                    except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                        raise InputError(f"teacher {teacher.url}, model {teacher.model}: {_first_line(error)}") from None
                    except openai.APITimeoutError as error:
                        counts["request_failed"] += 1
                        if len(answers) == known and counts["request_failed"] >= teacher.concurrency:
                            raise silent(error) from None
                    except openai.APIConnectionError as error:
                        raise silent(error) from None
                    except openai.OpenAIError:
                        counts["request_failed"] += 1
                    else:
                        if text is not None:  # an empty answer has been paid for too
                            answers[futures[future]] = text
                            cache.write(json.dumps({"key": futures[future], "answer": text}) + "\n")
                            cache.flush()
                        else:
                            counts["no_answer"] += 1
                    progress()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    outlines: list[str | None] = []
    for row in rows:
        text = answers.get(teacher.key(row))
        counts.update(["no_answer"] if text == "" else [])
        outline = REASONING.sub("", text).strip() if text else None
        reason = None if outline is None else problem(outline, row["story"])
        counts.update([reason] if reason else [])
        outlines.append(None if reason else outline)
    if rows and not any(outlines):
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        raise InputError(f"teacher {teacher.url}: not one usable outline in {len(rows)} rows ({reasons})")
    return outlines, counts


def problem(
    outline: str, story: str, least: int = MIN_WORDS, most: int = MAX_WORDS, refusal: re.Pattern = REFUSAL
) -> str | None:
    """Why an outline cannot be used: `refusal`, `outline_too_short`, `outline_too_long`, `outline_copies_story`; or None.

    least, most: words.
    """
    words = outline.lower().split()
    if refusal.match(outline.replace("’", "'")):
        return "refusal"
    if len(words) < least:
        return "outline_too_short"
    if len(words) > most:
        return "outline_too_long"
    runs, of_story = _runs(words), set(_runs(story.lower().split()))
    return "outline_copies_story" if sum(run in of_story for run in runs) > MAX_COPIED * len(runs) else None


def _runs(words: list[str]) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(COPY_RUN)), strict=False))


def _read_cache(path: Path) -> dict[str, str]:
    """Answers by key. A line cut short by a kill is skipped: its row is asked again."""
    answers = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
                answers[str(record["key"])] = str(record["answer"])
            except (ValueError, TypeError, KeyError):
                continue
    return answers


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
