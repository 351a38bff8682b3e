"""The executor on an NVIDIA GPU: steps are launched ahead of their results, all but the largest as one CUDA graph each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from fastqwen.engine.executor import StepHandle
from fastqwen.kernels import PromptTiles, StepTokens
from fastqwen.kernels.limits import TILE_TOKENS
from fastqwen.kernels.triton import sampling, step
from fastqwen.layers.attention import Attention
from fastqwen.layers.decoder import Decoder, Embedding
from fastqwen.model_config import ModelConfig
from fastqwen.plan import EnginePlan
from fastqwen.records import Admission, Row, ScheduledBatch
from fastqwen.runner.choices import Choice, choices_of, taken
from fastqwen.runner.logprobs import ToldLogprobs
from fastqwen.runner.model_runner import ModelRunner
from fastqwen.runner.pending import Extras, PendingStep
from fastqwen.runner.pooling import PooledStep, last_vectors
from fastqwen.runner.recording import Recording, alias, decode_layouts, prompt_layouts
from fastqwen.runner.step_layout import Ints, StepInputs, StepLayout, count_decode_rows, cut_tiles
from fastqwen.runner.structured import Constraints
from fastqwen.runner.wishes import counts_of

STEPS_IN_FLIGHT = 4  # host copies of a step's inputs and results; more than the steps that may be in flight


class CudaRunner(ModelRunner):
    run_ahead = 2

    def __init__(
        self,
        model: ModelConfig,
        decoder: Decoder,
        plan: EnginePlan,
        device: torch.device,
        structured: Constraints | None = None,
    ) -> None:
        super().__init__(model, decoder, plan, device, structured)
        assert isinstance(decoder.embed, Embedding), "a GPU holds the table"
        self._embed = decoder.embed
        # The last step's extras and tokens.
        self._untaken: tuple[Extras, Tensor, torch.cuda.Event] | None = None
        self.slots.block_tables[self.slots.spare] = plan.num_blocks  # padding writes into a block of its own
        self._library = getattr(decoder.ops, "library_prefill", False) and all(
            not isinstance(layer.mixer, Attention) or layer.mixer.parts.window is None for layer in decoder.layers
        )
        decode, prompts = self._layouts()
        most = plan.max_num_batched_tokens
        sizes = [layout.size for layout in decode + prompts]
        rows = plan.max_num_seqs
        sizes.append(StepLayout(most, most // TILE_TOKENS + rows, rows, rows).size)
        self._inputs = torch.zeros(max(sizes), dtype=torch.int32, device=device)
        self._decode_steps: list[Recording] = []  # by growing size, as the next
        self._prompt_steps: list[Recording] = []
        self._staging = [torch.zeros(max(sizes), dtype=torch.int32).pin_memory() for _ in range(STEPS_IN_FLIGHT)]
        # How often a slot's sequence has each token (kernels/wishes.py); made with the first one whose penalties depend on
        # it, of the memory that the plan leaves free: all slots have less than 130 MB of them.
        self._counts: dict[int, Tensor] = {}
        self._results = [torch.zeros(rows, dtype=torch.int32).pin_memory() for _ in range(STEPS_IN_FLIGHT)]
        told = (rows, sampling.TOLD_WORDS)
        self._told = [torch.zeros(told, dtype=torch.int32).pin_memory() for _ in range(STEPS_IN_FLIGHT)]
        self._events = [torch.cuda.Event() for _ in range(STEPS_IN_FLIGHT)]
        self._num_steps = 0

    def _layouts(self) -> tuple[list[StepLayout], list[StepLayout]]:
        plan = self._plan
        prompts = prompt_layouts(plan.max_num_batched_tokens, plan.max_num_seqs)
        return decode_layouts(plan.max_num_seqs), prompts if getattr(self._decoder.ops, "records_prompts", True) else []

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Record steps of each size, the largest first, so that the others fit into its memory.

        The model is in ``_compute``, which is called here and nowhere else for steps that are recorded: a replay launches
        the same kernels on what ``_upload`` has put into the same memory.
        """
        self._warm_up()
        decode, prompts = self._layouts()
        pool = torch.cuda.graph_pool_handle()
        recordings: list[Recording] = []
        for layout in sorted(decode + prompts, key=lambda layout: -layout.size):
            empty = np.zeros(self._inputs.shape[0], dtype=np.int32)
            inputs = layout.views(self._inputs)
            self._inputs.copy_(torch.from_numpy(empty))
            for slots in (inputs.slots, inputs.sample_slots):
                slots.fill_(self.slots.spare)
            self._recorded_step(layout)  # compiles what this size needs, outside of the recording
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            # The thread of a library of collectives may look at its events meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = self._recorded_step(layout)
            recordings.append(Recording(layout, graph, *(alias(one) for one in outputs)))
            del outputs
            progress(len(recordings), len(decode) + len(prompts))
        self._decode_steps = [one for one in reversed(recordings) if not one.layout.tiles]
        self._prompt_steps = [one for one in reversed(recordings) if one.layout.tiles]

    def _warm_up(self) -> None:
        """Compile what steps too large for a recording need, so that no request waits for a compiler: in the spare slot,
        whose blocks are all the spare one."""
        longest = min(self._plan.max_model_len, self._plan.max_num_batched_tokens)
        for start, num_tokens in ((64, 2), (0, 17), (0, 512)):
            if start + num_tokens <= longest:
                slot = self.slots.spare
                row = Row(slot=slot, request_id="", start=start, num_tokens=num_tokens, new_blocks=(), num_logits=1)
                self._launch([row])

    @torch.inference_mode()
    def submit(self, batch: ScheduledBatch) -> StepHandle:
        """The model is in ``_launch``: a recorded step replayed, or ``_compute``; both end with the tokens that the device's
        sampler chose. Rows of which the host knows more are chosen again from the same logits."""
        rows = batch.rows
        self.slots.update(batch.admissions, rows, self._counted(batch.admissions))
        self.states.before(batch.admissions, rows)
        hidden, logits, tokens, told = self._launch(rows)
        self.states.after(rows)
        if self._structured is not None:  # only now, so that the device computes while the host looks at grammars
            self._take_last_step(self._structured)
            self._structured.admit(batch.admissions)
        plain = all(self.slots.is_plain[row.slot] for row in rows)
        choices = [] if plain else choices_of(rows)
        extras = None if plain else self._extras(rows, choices, hidden, logits)
        if extras is not None and extras.places:
            self._choose_again(logits, tokens, told, extras)
        vectors = last_vectors(self._decoder, rows, hidden)
        pending = self._pending(batch, choices, tokens, told, extras)
        return pending if vectors is None else PooledStep(pending, rows, vectors, self._decoder.classifier)

    def _counted(self, admissions: Sequence[Admission]) -> dict[int, Tensor]:
        """By slot, the tokens of newcomers with penalties; what follows the sampler counts itself."""
        found = {}
        for one in admissions:
            if one.sampling.needs_history:
                if one.slot not in self._counts:
                    size = self._model.vocab_size
                    self._counts[one.slot] = torch.zeros(size, dtype=torch.int16, device=self.slots.device)
                ids, counts = counts_of(one, self._model.vocab_size)
                line = found[one.slot] = self._counts[one.slot].zero_()
                line[self.slots.upload(ids)] = self.slots.upload(counts)
        return found

    def _take_last_step(self, structured: Constraints) -> None:
        """A grammar must see a row's last token before it allows the next one."""
        if self._untaken is not None:
            extras, tokens, done = self._untaken
            done.synchronize()
            chosen = [int(tokens[place]) for place in extras.places]
            structured.take(*taken(extras.choices, chosen, extras.late))
            self._untaken = None

    def _launch(self, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states of all tokens; logits, tokens and log-probabilities of the rows that sample. Padding may follow."""
        num_decode = count_decode_rows(rows)
        prompts = [(row.slot, row.start, row.num_tokens) for row in rows[num_decode:]]
        found = self._recorded_for(rows, sum(-(-count // TILE_TOKENS) for _, _, count in prompts))
        tiles, fresh = cut_tiles(prompts, num_decode, library=self._library and found is None)
        if found is not None:
            self._upload(found.layout, rows, tiles, num_decode)
            found.graph.replay()
            num_samples = sum(row.num_logits for row in rows)
            logits, tokens, told = (one[:num_samples] for one in (found.logits, found.tokens, found.told))
            return found.hidden, logits, tokens, told
        layout = StepLayout.of(rows, len(tiles))
        self._upload(layout, rows, tiles, num_decode)
        inputs = layout.views(self._inputs)
        where = PromptTiles(inputs.tiles, TILE_TOKENS, fresh) if prompts else None
        return self._compute(inputs, num_decode, where, None)

    def _recorded_for(self, rows: list[Row], num_tiles: int) -> Recording | None:
        if not num_tiles and all(row.num_logits == 1 for row in rows):
            return next((one for one in self._decode_steps if one.layout.tokens >= len(rows)), None)
        num_tokens = sum(row.num_tokens for row in rows)
        found = next((one for one in self._prompt_steps if one.layout.tokens >= num_tokens), None)
        if found is None or num_tiles > found.layout.tiles or len(rows) > found.layout.rows:
            return None
        return found if sum(row.num_logits for row in rows) <= found.layout.samples else None

    def _upload(self, layout: StepLayout, rows: list[Row], tiles: Ints, num_decode: int) -> None:
        host = self._staging[self._num_steps % STEPS_IN_FLIGHT]
        layout.fill(host.numpy(), rows, tiles, num_decode, self.slots.spare)
        self._inputs[: layout.size].copy_(host[: layout.size], non_blocking=True)

    def _recorded_step(self, layout: StepLayout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = layout.views(self._inputs)
        if not layout.tiles:
            return self._compute(inputs, layout.tokens, None, None)
        return self._compute(inputs, layout.rows, PromptTiles(inputs.tiles, TILE_TOKENS), inputs.decode_count)

    def _compute(
        self, inputs: StepInputs, num_decode_rows: int, prompts: PromptTiles | None, decode_count: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slots, decoder = self.slots, self._decoder
        residual, cos_sin, q_scale = step.prepare(
            inputs.slots,
            inputs.positions,
            token_ids=slots.token_ids,
            frequencies=slots.inverse_frequencies,
            rope_scale=slots.rope_scale,
            embed=self._embed.table,
            first_id=self._embed.first_id,
            logn_len=self._model.logn_len,
        )
        self._embed.world.all_reduce(residual)
        where = StepTokens(
            positions=inputs.positions,
            slots=inputs.slots,
            row_starts=inputs.row_starts,
            cos_sin=cos_sin,
            q_scale=q_scale,
            block_tables=slots.block_tables,
            num_decode_rows=num_decode_rows,
            prompts=prompts,
            decode_count=decode_count,
            held=inputs.held,
        )
        decoder.advance(residual, where, self.states.layers)
        gives_all = prompts is None and len(inputs.sample_tokens) == len(residual)
        picked = residual if gives_all else residual[inputs.sample_tokens]
        if not len(picked):
            nothing = torch.empty((0, sampling.TOLD_WORDS), dtype=torch.int32, device=residual.device)
            return residual, picked, nothing[:, 0], nothing
        logits = decoder.logits(picked)
        return residual, logits, *self._next_tokens(logits, inputs.sample_slots, inputs.sample_positions)

    def _next_tokens(
        self,
        logits: Tensor,
        row_slots: Tensor,
        positions: Tensor,
        raw: Tensor | None = None,
        allowed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        slots = self.slots
        tokens, told = sampling.sample(
            logits,
            row_slots,
            positions,
            wishes=slots.wishes,
            bent=slots.bent,
            token_ids=slots.token_ids,
            raw=raw,
            allowed=allowed,
        )
        self._decoder.embed.world.broadcast(tokens)
        return tokens, told

    def _extras(self, rows: list[Row], choices: list[Choice], hidden: Tensor, logits: Tensor) -> Extras | None:
        """None: the device's sampler knows everything."""
        slots, structured = self.slots, self._structured
        again = [
            place
            for place, choice in enumerate(choices)
            if slots.host_forbids[choice.slot] or (structured is not None and structured.constrains(choice.slot))
        ]
        tells = any(
            slots.sampling[choice.slot].logprobs is not None and not slots.device_tells[choice.slot]
            for choice in choices
        )
        if not again and not tells and not any(row.prompt_logprobs for row in rows):
            return None
        return Extras(rows, choices, again, hidden, logits, self._decoder, slots)

    def _choose_again(self, logits: Tensor, tokens: Tensor, told: Tensor, extras: Extras) -> None:
        """In place of what the device's sampler chose."""
        host = np.array([extras.places, *zip(*((one.slot, one.position) for one in extras.choices), strict=True)])
        places, row_slots, positions = self.slots.upload(host.astype(np.int32)).unbind(0)
        raw = logits[places.long()]
        bent = raw.to(torch.float32, copy=True)
        allowed = self._forbid(bent, extras)
        tokens[places.long()], told[places.long()] = self._next_tokens(bent, row_slots, positions, raw, allowed)

    def _forbid(self, logits: Tensor, extras: Extras) -> Tensor | None:
        return extras.forbid(logits, self._structured)

    def _pending(
        self, batch: ScheduledBatch, choices: list[Choice], tokens: Tensor, told: Tensor, extras: Extras | None
    ) -> PendingStep:
        place = self._num_steps % STEPS_IN_FLIGHT
        self._num_steps += 1
        host, event = self._results[place][: tokens.shape[0]], self._events[place]
        host.copy_(tokens, non_blocking=True)
        logprobs = None
        if any(self.slots.device_tells[choice.slot] for choice in choices):
            words = self._told[place][: told.shape[0]]
            words.copy_(told, non_blocking=True)
            logprobs = ToldLogprobs(words, choices, self.slots)
        event.record()
        if extras is not None and self._structured is not None and extras.places:
            self._untaken = extras, host, event
        return PendingStep(batch, host, logprobs, event, extras)
