"""What the EdiVal commands load: detector, VLM, DINO, quality scorer, and where instructions take their values."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtedit_fast.edival.backends import VLM, Detector, Quality
    from mtedit_fast.edival.consistency import ContentConsistency
    from mtedit_fast.edival.instructions import Instruction
    from mtedit_fast.edival.objects import SceneObject
    from mtedit_fast.edival.pools import Pools

    Instructor = Callable[[Path, dict[str, SceneObject], int, Random], list[tuple[Instruction, Pools]]]

_WORDS = {
    "objects": "apple backpack ball balloon bench bicycle bird book bottle bowl candle car cat chair clock cup dog "
    "flower guitar hat kite lamp ladder mug pillow plant rabbit suitcase teapot umbrella vase",
    "materials": "wood metal glass plastic stone leather fabric paper ceramic",
    "texts": "HELLO OPEN CAFE LOVE 2030 SALE WELCOME STOP ART MUSIC",
    "backgrounds": "beach forest desert mountain library kitchen park street snow harbor",
}
VALUES: dict[str, Any] = {name: words.split() for name, words in _WORDS.items()}


def load_models(
    playground: bool, detector: str, vlm: str | None, model: str, key: str | None, device: str
) -> tuple[Detector, VLM]:
    """Detector and VLM; the playground's oracle is both."""
    if playground:
        from mtedit_fast.training.playground.edival import PlaygroundOracle

        oracle = PlaygroundOracle()
        return oracle, oracle
    from mtedit_fast.edival.grounding import GroundingDetector

    asked = load_vlm(vlm, model, key)
    return GroundingDetector.from_pretrained(_checkpoint(detector, "detector"), device=_device(device)), asked


def load_vlm(url: str | None, model: str, key: str | None) -> VLM:
    """A server's model. ValueError without a URL."""
    if url is None:
        raise ValueError("vlm: expected the URL of an OpenAI-compatible server, e.g. http://localhost:8000/v1")
    from mtedit_fast.edival.vlm import HTTPVLM

    return HTTPVLM(url, model, api_key=key)


def load_consistency(playground: bool, dino: str, registers: str, device: str) -> ContentConsistency:
    """Content consistency with a DINO from a hub name or folder, or the playground's."""
    from mtedit_fast.edival.consistency import ContentConsistency

    if playground:
        from mtedit_fast.training.playground.models import load_dino

        model: Any = load_dino()
    else:
        from transformers import AutoModel

        model = AutoModel.from_pretrained(_checkpoint(dino, "dino")).eval()
    return ContentConsistency(model.to(_device(device)), registers=registers)  # type: ignore[arg-type]


def load_quality(path: str) -> Quality:
    """The scorer that `module:factory` returns."""
    from mtedit_fast.training.rewards import load_reward

    scorer: Any = load_reward(path)
    scorer = scorer()
    if not callable(getattr(scorer, "score", None)):
        raise ValueError(f"quality {path!r}: expected a factory of objects with a score method, got {scorer!r}")
    return scorer


def load_instructor(playground: bool, values: Path | None, vlm: str | None, model: str, key: str | None) -> Instructor:
    """(image file, objects, turns, rng) -> a chain for `BenchmarkRow.of`."""
    from mtedit_fast.edival.images import load_image
    from mtedit_fast.edival.pools import generate
    from mtedit_fast.edival.proposers import ListProposer, VLMProposer

    if playground:
        from mtedit_fast.training.playground.edival import instruct_scene
        from mtedit_fast.training.playground.oracle import read_states

        return lambda image, scene, turns, rng: instruct_scene(
            read_states(load_image(image)[None])[0], scene, turns=turns, seed=rng
        )[0]
    fallback = ListProposer(**(VALUES if values is None else VALUES | _read_values(existing(values, "values"))))
    asked = None if vlm is None else load_vlm(vlm, model, key)

    def chain_of(
        image: Path, scene: dict[str, SceneObject], turns: int, rng: Random
    ) -> list[tuple[Instruction, Pools]]:
        proposer = fallback if asked is None else VLMProposer(asked, load_image(image, 512), fallback)
        return generate(scene, proposer=proposer, turns=turns, seed=rng)

    return chain_of


def _read_values(path: Path) -> dict[str, Any]:
    names = ("objects", "materials", "texts", "backgrounds", "colors", "counts")
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"values: {path} is not JSON: {error}") from None
    if not isinstance(lists, dict) or not all(name in names and isinstance(v, list) for name, v in lists.items()):
        raise ValueError(f"values: {path} must be an object of lists, among {', '.join(names)}")
    return lists


@contextmanager
def vlm_errors() -> Iterator[None]:
    """A server that fails for good is an error the user can act on."""
    from mtedit_fast.edival.vlm import VLMError

    try:
        yield
    except VLMError as error:
        raise ValueError(f"{error}; see to the server and run the command again") from error


def existing(path: Path, name: str) -> Path:
    """`path`, or a ValueError where there is no such file."""
    if not path.is_file():
        raise ValueError(f"{name}: no file {path}")
    return path


def _checkpoint(path: str, name: str) -> str:
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ValueError(f"{name}: nothing at {path}; pass a folder or a hub name")
    return str(Path(path).expanduser()) if path.startswith("~") else path


def _device(name: str) -> str:
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
