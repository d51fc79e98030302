"""The sampler's GPU loop: every step has the same shapes, so that it can be recorded once and replayed.

At GPT-2's size a decode step is some two hundred kernels of a few microseconds each: launched one by one from Python, they
take longer to launch than to run. A CUDA graph (docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs) launches them in
one call. Everything decided per token (draw, end, position) is therefore decided on the device; every `CHECK` steps the host
checks which rows have ended, takes them out and puts waiting ones into their slots.
"""

from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from tqdm import tqdm
from transformers import GPT2LMHeadModel

from storygen.decoder import Decoder, draw

CHECK = 16  # a row that has ended idles for half as many steps on average
BUCKET = 128  # the cache is read up to the longest row, rounded up: one graph per length


class Slots:
    """The state of every slot of the batch, on the device. Each `step` draws one token for each slot that is not done."""

    def __init__(self, decoder: Decoder, slots: int, room: int, eos_id: int, temperature: float, top_p: float):
        self.decoder, self.room, self.eos_id, self.temperature, self.top_p = decoder, room, eos_id, temperature, top_p
        device = decoder.tokens.device

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        self.tokens, self.positions = zeros(), zeros()  # the newest token, not yet in the cache, and its position
        self.count, self.limit = zeros(), zeros()  # tokens drawn, and the most that may be
        self.done = zeros(dtype=torch.bool).fill_(True)
        # One column more than can be drawn: slots that are done write there, or after their last token.
        self.ids, self.logps = zeros(room + 1), zeros(room + 1, dtype=torch.float32)
        self.uniforms = zeros(room + 1, dtype=torch.float32)

    def step(self, longest: int) -> None:
        """Slots that are done repeat their last step; what they write is never read."""
        logits = self.decoder.step(self.tokens, self.positions, longest)
        at = self.count[:, None]
        chosen, logp = draw(logits, self.uniforms.gather(1, at)[:, 0], self.temperature, self.top_p)
        self.ids.scatter_(1, at, chosen[:, None])
        self.logps.scatter_(1, at, logp[:, None])
        self.count.add_((~self.done).long())
        self.done.logical_or_((chosen == self.eos_id) | (self.count >= self.limit))
        self.tokens.copy_(torch.where(self.done, self.tokens, chosen))
        self.positions.add_((~self.done).long())

    def fill(self, slots: list[int], prefixes: list[list[int]], rooms: list[int], uniforms: np.ndarray) -> None:
        """Put prefixes into slots; their keys and values, except the last token's, are already in the cache."""
        at = torch.tensor(slots, device=self.tokens.device)
        for state, values in (
            (self.tokens, [prefix[-1] for prefix in prefixes]),
            (self.positions, [len(prefix) - 1 for prefix in prefixes]),
            (self.count, [0] * len(slots)),
            (self.limit, rooms),
            (self.done, [False] * len(slots)),
        ):
            state[at] = torch.tensor(values, dtype=state.dtype).to(state.device)
        self.uniforms[at] = torch.from_numpy(uniforms).to(self.uniforms.device)

    def take(self, slots: list[int]) -> list[tuple[list[int], list[float]]]:
        """What was drawn in slots that are done."""
        at = torch.tensor(slots, device=self.tokens.device)
        count, ids, logps = (state[at].tolist() for state in (self.count, self.ids, self.logps))
        return [(row[:n], logp[:n]) for n, row, logp in zip(count, ids, logps, strict=True)]


class Replay:
    """Runs `step(longest)` through a CUDA graph, one for each `longest`.

    A length's first step runs directly, to warm up what its kernels need; the second is recorded.
    """

    def __init__(self, step: Callable[[int], None]):
        self.step = step
        self.pool = torch.cuda.graph_pool_handle()  # shared: graphs never run at once, and what they keep is in the slots
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}

    def __call__(self, longest: int) -> None:
        if longest not in self.graphs:
            self.graphs[longest] = None
            self.step(longest)
            return
        if self.graphs[longest] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):  # records, does not run
                self.step(longest)
            self.graphs[longest] = graph
        self.graphs[longest].replay()


def sample_rows(
    model: GPT2LMHeadModel,
    jobs: list[tuple[int, int]],
    prefixes: list[list[int]],
    rooms: list[int],
    uniforms: Callable[[int, int], np.ndarray],
    *,
    slots: int,
    eos_id: int,
    vocabulary: int | None,
    temperature: float,
    top_p: float,
    dtype: torch.dtype,
    bar: tqdm,
) -> dict[tuple[int, int], tuple[list[int], list[float]]]:
    """(ids, logps) of every job (prompt, completion); `rooms`: token limit of each prompt's completions.

    uniforms(prompt, completion): the numbers (its prompt's room,) that a completion is drawn with. On a CPU the same
    steps run without graphs.
    """
    length, room = max(len(p) + r for p, r in zip(prefixes, rooms, strict=True)), max(rooms)
    length = (length + BUCKET - 1) // BUCKET * BUCKET
    decoder = Decoder(model, slots, length, dtype, vocabulary)
    state = Slots(decoder, slots, room, eos_id, temperature, top_p)
    step = Replay(state.step) if model.device.type == "cuda" else state.step
    waiting, drawn = deque(jobs), {}
    running: dict[int, tuple[int, int]] = {}  # the job of each slot in use
    reached: dict[int, int] = {}  # a bound on its position, so the host need not ask
    while waiting or running:
        fresh = {slot: waiting.popleft() for slot in range(slots) if slot not in running and waiting}
        of_prompt: dict[int, list[int]] = {}
        for slot, (prompt, _) in fresh.items():
            of_prompt.setdefault(prompt, []).append(slot)
        for prompt, its_slots in of_prompt.items():
            if len(prefixes[prompt]) > 1:  # its last token is the first step's input
                decoder.place(its_slots, *decoder.prefill(prefixes[prompt][:-1])[1:])
        if fresh:
            numbers = np.zeros((len(fresh), room + 1), dtype=np.float32)
            for row, (prompt, completion) in zip(numbers, fresh.values(), strict=True):
                row[: rooms[prompt]] = uniforms(prompt, completion)
            of = [prompt for prompt, _ in fresh.values()]
            state.fill(list(fresh), [prefixes[p] for p in of], [rooms[p] for p in of], numbers)
            reached.update({slot: len(prefixes[prompt]) - 1 for slot, (prompt, _) in fresh.items()})
        running.update(fresh)

        longest = max(reached[slot] for slot in running) + CHECK
        longest = min(length, (longest + BUCKET - 1) // BUCKET * BUCKET)
        for _ in range(CHECK):
            step(longest)
        done = state.done.tolist()  # waits for the device
        ended = [slot for slot in running if done[slot]]
        for slot, result in zip(ended, state.take(ended) if ended else [], strict=True):
            drawn[running.pop(slot)] = result
            bar.update()
        reached = {slot: position + CHECK for slot, position in reached.items() if slot in running}
    return drawn
