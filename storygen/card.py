"""The model card of a folder, for people who did not make the model, and the folder's upload to the hub."""

import json
from pathlib import Path
from typing import Any

from storygen.cli import InputError

# The files in a stage's output folder that make up the model.
MODEL_FILES = [
    "README.md", "config.json", "generation_config.json", "*.safetensors*", "tokenizer*", "*.jinja", "vocab*", "merges*",
    "special_tokens_map.json", "added_tokens.json",
]  # fmt: skip


def write_card(
    folder: Path,
    kind: str,
    config: dict[str, Any],
    manifest: dict[str, Any],
    figures: list[tuple[str, str]],
    name: str | None,
) -> None:
    """Write `folder/README.md`: what the model is, what was measured, what it was made from and with which settings.

    config: the stage's arguments; manifest: that of its data; figures: (what, value); name: its name on the hub.
    """
    from huggingface_hub import ModelCard, ModelCardData

    counts = manifest["counts"]
    sources = [
        (
            origin,
            source.get("name") or Path(source["from"]).name,
            counts[origin]["read"],
            sum(counts[origin]["kept"].values()),
        )
        for origin, source in manifest["sources"].items()
        if origin in counts
    ]
    own_data = manifest["preset"] == "demo" and all(source["from"] == "corpus" for source in manifest["sources"].values())
    ours = own_data and licence_of(config["model"]) == "cc0-1.0"
    data = ModelCardData(
        language="en", library_name="transformers", pipeline_tag="text-generation", tags=["story-gen", "story-generation"],
        license="cc0-1.0" if ours else None, datasets=[s["name"] for s in manifest["sources"].values() if "name" in s] or None,
    )  # fmt: skip
    card = ModelCard.from_template(
        data, template_path=str(Path(__file__).with_name("card.md")), name=name or folder.resolve().name, kind=kind,
        base=Path(config["model"]).name if Path(config["model"]).exists() else config["model"], sources=sources, figures=figures,
        recipe=json.dumps({key: value for key, value in config.items() if key not in ("out", "data", "model", "resume")}, indent=1),
        licence="Base model and data are CC0, and so is this." if ours else "Its licence is that of its base model and its data.",
    )  # fmt: skip
    (folder / "README.md").write_text(str(card), "utf-8")


def licence_of(model: str) -> str | None:
    """The licence that a model folder's card names; None for a folder without, and for a name on the hub."""
    from huggingface_hub import ModelCard

    card = Path(model) / "README.md"
    return ModelCard.load(card).data.license if card.is_file() else None


def before_and_after(run_dir: Path, prompts: int) -> list[tuple[str, str]]:
    """What an RL run measured on its held-out prompts in its first and last evaluations, from `metrics.jsonl`."""
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    first, *_, last = [row for row in logged if "eval/reward" in row]
    kinds = ("eval/reward", "eval/parts/", "eval/samples/", "eval/length/")
    return [
        (
            f"{name.removeprefix('eval/')}, {prompts} held-out prompts, before and after RL",
            f"{first[name]:.3f}, {last[name]:.3f}",
        )
        for name in last
        if name.startswith(kinds) and name in first
    ]


def push(folder: Path, name: str) -> str:
    """Upload a model folder to the hub as `name`, using the client's own login. Returns its URL."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        where = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=where.repo_id, folder_path=folder, allow_patterns=MODEL_FILES, commit_message="Upload by story-gen"
        )
    except Exception as error:  # noqa: BLE001  the client and what it stands on raise their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise InputError(f"--push-to-hub {name}: {reason}; the model lies in {folder}: hf upload {name} {folder}") from None
    return str(where)
