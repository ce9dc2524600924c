"""The serving engine on a GPU; see ``gpu.py``."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tests import test_engine_families as tiny_families
from tests import tiny
from tests.engines import by_generate, collect, greedy, prompt, running, together, wait
from tests.split_models import split
from tests.test_engine_families import FAMILIES, NO_CACHE, beside_others, by_whole_passes, letters

from ollama_forge.architectures.learn import map_checkpoint
from ollama_forge.checkpoints.checkpoint import Checkpoint
from ollama_forge.directions.direction import RefusalDirection
from ollama_forge.edits.checkpoint_folder import write_checkpoint
from ollama_forge.edits.fitted import FittedFactors
from ollama_forge.edits.plan import vector_reader
from ollama_forge.edits.planned_record import planned_record
from ollama_forge.edits.registry import method
from ollama_forge.edits.settings import EditSettings
from ollama_forge.models.chat_model import ChatModel, LoadSettings
from ollama_forge.models.device import release_memory
from ollama_forge.serving.engine.base import Constraint, EngineRequest, SamplingParams
from ollama_forge.serving.engine.batched_runner import BatchedRunner
from ollama_forge.serving.engine.cuda_graphs import StepGraphs
from ollama_forge.serving.engine.kv_cache import layers_with_kv
from ollama_forge.serving.engine.live import LiveEdit
from ollama_forge.serving.engine.model_runner import Forward
from ollama_forge.serving.engine.sampler import sample
from ollama_forge.serving.engine.scheduler import Scheduler
from ollama_forge.serving.engine.sequence import Sequence as EngineSequence
from ollama_forge.serving.engine.transformers import TransformersEngine
from ollama_forge.text.tokenizer import Tokenizer

__all__ = ["FAMILIES", "FEATURES", "batching", "family", "live", "sampler", "speed", "split_engine", "steps"]

Check = Callable[[str, Callable[[], str]], None]
SCHEMA = {"type": "object", "properties": {"flag": {"type": "boolean"}}, "required": ["flag"]}
STREAMS = (1, 16, 64)
WORDS, TOKENS, STEPS = 64, 128, 40


def same(found: Any, expected: Any, what: str) -> None:
    if found != expected:
        raise ValueError(f"{what}: {found} instead of {expected}")


def on_device(name: str, device: torch.device) -> ChatModel:
    return tiny_families.wrapped(tiny_families.build(name).module.to(device))


# -- answers ----------------------------------------------------------------------------------------------------------


def family(name: str, device: torch.device) -> str:
    """The checks of ``tests/test_engine_families.py``: ragged rows, late and cancelled ones, a second turn."""
    model, expected = on_device(name, device), FAMILIES[name][0]
    answer = by_whole_passes if expected == NO_CACHE else by_generate
    requests = [greedy(prompt(22, 1), 12), greedy(prompt(5, 2), 6), greedy(prompt(31, 3), 6)]
    alone = [answer(model, request.ids, request.max_tokens) for request in requests]
    with running(model, slots=4) as engine:
        found = f"{letters(engine.support)} graphs: {engine.support.graphs}"
        same(wait(lambda: beside_others(engine, requests)), alone, f"{found}; together")
        same(together(engine, requests[:1]), alone[:1], "again")
        turn = (*requests[0].ids, *alone[0], *prompt(7, 9))
        before = engine.stats.prefilled_tokens
        same(together(engine, [greedy(turn, 6)]), [answer(model, turn, 6)], "the second turn")
        new = engine.stats.prefilled_tokens - before
        same(new, 1 + 7 if engine.support.reuses else len(turn), "tokens of the second turn")
        runner: Any = engine._scheduler.runner
        if engine.support.graphs:
            longer = greedy(prompt(9, 4), 60)  # with captured steps, and rows that come and go
            others = [greedy(prompt(4 + count, count), count) for count in (8, 25, 40)]
            wanted = [by_generate(model, each.ids, each.max_tokens) for each in (longer, *others)]
            same(together(engine, [longer, *others]), wanted, "with graphs")
            same(runner.graphs.failed, False, "a failed capture")
    differs = "" if letters(engine.support) == expected else f", expected {expected}"
    return f"{found}{differs}, ids equal"


def constrained(device: torch.device) -> str:
    model = on_device("llama", device)
    request = greedy(prompt(9), 60, constraint=Constraint(json.dumps(SCHEMA)))
    free = greedy(prompt(12, 1), 40)
    with running(model) as engine:
        said, beside = together(engine, [request, free])
    text = tiny.tokenizer().decode(said)
    same(sorted(json.loads(text)), ["flag"], "keys")
    same(beside, by_generate(model, free.ids, 40), "beside it")
    return f"{text}, and a free answer beside it"


@torch.inference_mode()
def logprobs(device: torch.device) -> str:
    model = on_device("llama", device)
    ids = prompt(9)
    with running(model) as engine:
        said = wait(lambda: collect(engine, greedy(ids, 20, top_logprobs=3)))
    whole = torch.tensor([[*ids, *(token.id for token in said)]], device=device)
    logs = model.module(input_ids=whole).logits[0, len(ids) - 1 : -1].log_softmax(-1).cpu()
    worst = max(abs(float(token.logprob or 0.0) - float(logs[at, token.id])) for at, token in enumerate(said))
    same([top.id for top in said[7].top], logs[7].topk(3).indices.tolist(), "alternatives")
    same(worst < 1e-4, True, f"largest difference {worst:.1e}")
    return f"largest difference {worst:.1e}"


@torch.inference_mode()
def embeddings(device: torch.device) -> str:
    model = on_device("llama", device)
    texts = [prompt(length, length) for length in (3, 30, 11, 200)]
    with running(model) as engine:
        vectors = wait(lambda: engine.embed(texts))
    worst = 0.0
    for ids, vector in zip(texts, vectors, strict=True):
        base: Any = model.module.base_model
        mean = base(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0].mean(0)
        worst = max(worst, float((torch.tensor(vector, device=device) - mean / mean.norm()).abs().max()))
    same(worst < 1e-4, True, f"largest difference {worst:.1e}")
    return f"largest difference {worst:.1e}"


def sampled(device: torch.device) -> str:
    """Seeded draws, alone and beside others, with each kind of filter and with penalties."""
    model = on_device("llama", device)
    kinds = [
        SamplingParams(seed=1),
        SamplingParams(top_k=0, top_p=1.0, seed=2),
        SamplingParams(top_k=0, top_p=0.9, seed=3),
        SamplingParams(top_k=0, typical_p=0.7, seed=4),
        SamplingParams(min_p=0.1, repeat_penalty=1.2, seed=5),
        SamplingParams(temperature=0.0),
    ]
    requests = [EngineRequest(prompt(9 + place, place), 30, params) for place, params in enumerate(kinds)]
    with running(model, slots=8) as engine:
        alone = [together(engine, [request])[0] for request in requests]
        same(together(engine, requests), alone, "together")
    return f"{len(kinds)} kinds, together as alone"


def experts(device: torch.device) -> str:
    """Experts in bf16, where transformers multiplies them without asking the device how many tokens each has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3_moe",
        **{**tiny_families.HEADS, "hidden_size": 256, "head_dim": 64, "intermediate_size": 512},
        moe_intermediate_size=128,
        num_experts=16,
        num_experts_per_tok=4,
    )
    torch.manual_seed(0)
    model = tiny_families.wrapped(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device).eval())
    requests = [greedy(prompt(9 + place, place), 40) for place in range(3)]
    with running(model) as engine:
        found = together(engine, requests)
        pairs = zip(found, [wanted(model, request) for request in requests], strict=True)
        alike = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=True))
        return f"graphs: {engine.support.graphs}, {alike} of 120 ids equal (bf16 rounds)"


def wanted(model: ChatModel, request: EngineRequest) -> list[int]:
    return by_generate(model, request.ids, request.max_tokens)


def failed_capture(device: torch.device) -> str:
    """A model that waits for the device only while it is captured, so that nobody sees it beforehand."""
    model = on_device("llama", device)
    forward = model.forward

    def reads(**inputs: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            inputs["input_ids"].sum().item()
        return forward(**inputs)

    model.forward = reads  # type: ignore[method-assign]
    request = greedy(prompt(20, 1), 40)
    with running(model) as engine:
        same(engine.support.graphs, False, "graphs")
        same(together(engine, [request])[0], wanted(model, request), "without graphs")
    model.forward = forward  # type: ignore[method-assign]
    release_memory()
    with running(model) as engine:
        found = engine.support.graphs
        same(together(engine, [request])[0], wanted(model, request), "afterwards")
    release_memory()
    return f"without graphs after it; another engine has graphs: {found}"


def two_models(device: torch.device) -> str:
    """An engine is loaded and captures its steps while another one answers."""
    models = [on_device(name, device) for name in ("llama", "gpt_neox")]
    requests = [greedy(prompt(9 + each, each), 100) for each in range(6)]

    def answers(engine: TransformersEngine) -> list[list[int]]:
        return [together(engine, [request])[0] for request in requests]

    with running(models[0]) as first, ThreadPoolExecutor(1) as pool:
        beside = pool.submit(answers, first)
        with running(models[1]) as second:
            found = [answers(second), beside.result()]
        supports = first.support.graphs, second.support.graphs
    expected = [[wanted(model, request) for request in requests] for model in reversed(models)]
    same(found, expected, "answers")
    return f"graphs: {supports}, ids equal"


def images(device: torch.device) -> str:
    """Prompts with images of different sizes beside a text, whose positions the module finds (Qwen-VL)."""
    model = on_device("qwen2_5_vl", device)
    requests = [
        tiny_families.with_image(prompt(15, 1), 8, 8),
        greedy(prompt(22, 2), 10),
        tiny_families.with_image(prompt(9, 3), 4, 12),
    ]
    alone = []
    for request in requests:
        media = {name: value.to(device) for name, value in (request.media or {}).items()}  # type: ignore[union-attr, attr-defined]
        alone.append(by_generate(model, request.ids, 10, **media))
    with running(model, slots=4) as engine:
        found = f"{letters(engine.support)} graphs: {engine.support.graphs}"
        same(together(engine, requests), alone, "together")
        same(together(engine, requests), alone, "again")
        same(together(engine, [requests[2]]), alone[2:], "alone")
    return f"{found}, ids equal"


def load_while_answering(device: torch.device) -> str:
    """Engines are loaded, answer and are unloaded, again and again, while another one answers all the time."""
    first, second = on_device("llama", device), on_device("gpt_neox", device)
    request = greedy(prompt(20, 1), 100)
    expected = [wanted(model, request) for model in (first, second)]
    with running(first) as engine, ThreadPoolExecutor(1) as pool:
        beside = pool.submit(lambda: [together(engine, [request, request])[0] for _ in range(10)])
        supports = []
        while not beside.done():
            with running(second) as other:
                same(together(other, [request])[0], expected[1], "the one that is loaded")
                supports.append(other.support.graphs)
        same(beside.result(), [expected[0]] * 10, "the one that answers")
    return f"{len(supports)} times, graphs: {sum(map(bool, supports))} of them, ids equal"


def split_engine(device: torch.device) -> str:
    """An engine whose layers are halved over the CPU and the device, in both orders."""
    lines = []
    texts = [prompt(length, length) for length in (3, 30, 400)]
    for family_name, layers in (("llama", "model.layers"), ("gpt_neox", "gpt_neox.layers")):
        for devices in ((torch.device("cpu"), device), (device, torch.device("cpu"))):
            model = on_device(family_name, torch.device("cpu"))
            requests = [greedy(prompt(9 + 7 * each, each), 40) for each in range(4)]
            expected = [wanted(model, request) for request in requests]
            with running(model) as engine:
                vectors = torch.tensor(wait(lambda e=engine: e.embed(texts)))  # type: ignore[misc]
            count = len(model.module.get_submodule(layers))  # type: ignore[arg-type]
            halves = split(model, [f"{layers}.{number}" for number in range(count)], devices)
            with running(halves) as engine:
                same(together(engine, requests), expected, "answers")
                moved = (torch.tensor(wait(lambda e=engine: e.embed(texts))) - vectors).abs().max()  # type: ignore[misc]
                same(float(moved) < 1e-4, True, f"embeddings differ by {moved:.1e}")
                lines.append(f"{family_name} from {devices[0]}: {letters(engine.support)} {engine.support.graphs}")
    return f"{'; '.join(lines)}; ids equal"


FEATURES = (
    constrained, logprobs, embeddings, sampled, experts, failed_capture, two_models, images, load_while_answering,
)  # fmt: skip


def live(device: torch.device, folder: Path) -> str:
    source = tiny.save(tiny.build("mistral"), folder / "live")
    model_map = map_checkpoint(source)
    vector = torch.randn(1, model_map.d_model, generator=torch.Generator().manual_seed(1))
    settings = EditSettings(norm_preserving=False, skip_begin_layers=0, skip_end_layers=0, strength=2.0)
    direction = RefusalDirection(torch.nn.functional.normalize(vector), layer=1)
    plan = method("orthogonal").plan(model_map, direction, FittedFactors(), settings, vector_reader(source.tensors))
    write_checkpoint(source, model_map, plan, folder / "live-edited", settings=None)
    load = LoadSettings(dtype="float32", device=str(device))
    edited = ChatModel.load(Checkpoint(folder / "live-edited", "edited", "folder"), load)
    base = ChatModel.load(source, load)
    model = ChatModel.load(source, load)
    engine = TransformersEngine(model, slots=4, live=LiveEdit(model, planned_record(source, plan, {})))
    try:
        request = greedy(prompt(20, 3), 40)
        by_strength = {strength: replace(request, strength=strength) for strength in (0.0, 1.0, -0.5)}
        alone = {strength: together(engine, [each])[0] for strength, each in by_strength.items()}
        mixed = together(engine, list(by_strength.values()))
        same(alone[0.0], by_generate(base, request.ids, 40), "strength 0")
        same(alone[1.0], by_generate(edited, request.ids, 40), "strength 1")
        same(mixed, list(alone.values()), "mixed")
        same(len(set(map(tuple, mixed))), 3, "different answers")
        return f"strengths 0, 1 and -0.5, mixed as alone; graphs: {engine.support.graphs}"
    finally:
        engine.close()


# -- speed ------------------------------------------------------------------------------------------------------------


def big(device: torch.device, layers: int, width: int) -> ChatModel:
    """A random bf16 model shaped as Llama 3, with the byte tokenizer."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tokenizer = Tokenizer(tiny.tokenizer(), end_ids=(1,), vocabulary=config.vocab_size)
    return ChatModel(module, tokenizer, None, LoadSettings(dtype="bfloat16", device=str(device)))


def requests_of(streams: int, round_: int, tokens: int, params: SamplingParams) -> list[EngineRequest]:
    return [EngineRequest(prompt(WORDS, 1000 * round_ + each), tokens, params) for each in range(streams)]


def timed(work: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def speed(check: Check, device: torch.device, layers: int, width: int) -> None:
    state: dict[str, Any] = {}
    greedy_params, drawn = SamplingParams(temperature=0.0), SamplingParams(seed=1)

    def load() -> str:
        state["model"] = model = big(device, layers, width)
        state["engine"] = engine = TransformersEngine(model, slots=max(STREAMS))
        weights = sum(parameter.numel() for parameter in model.module.parameters())
        together(engine, requests_of(2, 9, 4, greedy_params))
        return f"{weights / 1e9:.2f} G weights; {letters(engine.support)}, graphs: {engine.support.graphs}"

    def rates(streams: int, params: SamplingParams) -> str:
        engine: TransformersEngine = state["engine"]
        found = []
        for round_ in range(3):  # graphs are captured in the first
            requests = requests_of(streams, round_, TOKENS, params)
            found.append(streams * TOKENS / timed(lambda requests=requests: together(engine, requests)))
        return f"{found[0]:.0f}, {found[1]:.0f}, {found[2]:.0f} tokens/s"

    def baseline(streams: int) -> str:
        model: ChatModel = state["model"]
        ids = torch.tensor([list(each.ids) for each in requests_of(streams, 5, 1, greedy_params)], device=device)

        def run() -> None:
            with torch.inference_mode():
                model.module.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=TOKENS,
                    min_new_tokens=TOKENS,
                    do_sample=False,
                    pad_token_id=0,
                )

        run()
        return f"{streams * TOKENS / timed(run):.0f} tokens/s"

    check("speed: load", load)
    for streams in STREAMS:
        check(f"speed: {streams} streams", lambda streams=streams: rates(streams, greedy_params))  # type: ignore[misc]
        check(f"speed: {streams} by generate", lambda streams=streams: baseline(streams))  # type: ignore[misc]
    check("speed: 16 streams, sampled", lambda: rates(16, drawn))

    def short_answers() -> str:
        found = []
        for round_ in range(10, 13):
            requests = requests_of(64, round_, 2, greedy_params)
            found.append(1e3 * timed(lambda requests=requests: together(state["engine"], requests)))
        return f"{found[0]:.0f}, {found[1]:.0f}, {found[2]:.0f} ms"

    check("speed: 64 answers, 2 tokens", short_answers)

    def unload() -> str:
        state.pop("engine").close()
        state.clear()
        release_memory()
        used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return f"{used / 2**20:.0f} MiB in use, {held / 2**20:.0f} MiB held"

    check("speed: unloaded", unload)


def batching(check: Check, device: torch.device, layers: int, width: int) -> None:
    """transformers' own continuous batching of the same prompts, with paged attention."""
    model = big(device, layers, width)
    module: Any = model.module

    def rates(streams: int) -> str:
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
        found = []
        for round_ in range(2):  # the first one captures graphs
            inputs = [list(each.ids) for each in requests_of(streams, round_, TOKENS, SamplingParams(temperature=0.0))]

            def run(inputs: list[list[int]] = inputs) -> None:
                answers = module.generate_batch(
                    inputs=inputs, generation_config=config, progress_bar=False, persistent_manager=True
                )
                counts = {len(answer.generated_tokens) for answer in answers.values()}
                if len(answers) != len(inputs) or counts != {TOKENS}:
                    raise ValueError(f"{len(answers)} answers of {counts} tokens")

            found.append(streams * TOKENS / timed(run))
        return f"{found[0]:.0f}, {found[1]:.0f} tokens/s"

    for streams in STREAMS:
        check(f"batching: {streams} streams", lambda streams=streams: rates(streams))  # type: ignore[misc]


def sampler(check: Check, device: torch.device) -> None:
    """The time to choose tokens, and to read them, by the kind of the parameters."""
    kinds = {
        "greedy": SamplingParams(temperature=0.0),
        "usual": SamplingParams(seed=1),
        "whole vocabulary": SamplingParams(top_k=0, top_p=1.0, seed=2),
        "top_p alone": SamplingParams(top_k=0, top_p=0.9, seed=3),
        "typical": SamplingParams(top_k=0, typical_p=0.7, seed=4),
        "min_p, penalty": SamplingParams(min_p=0.1, repeat_penalty=1.2, seed=5),
    }

    @torch.inference_mode()
    def times(kind: str) -> str:
        found = []
        for rows in STREAMS:
            logits = torch.randn(rows, 128256, device=device, dtype=torch.bfloat16)
            requests = [EngineRequest(prompt(WORDS, row), 100, kinds[kind]) for row in range(rows)]
            states = [EngineSequence.of(each, None, None).sampling for each in requests]  # type: ignore[arg-type]
            draw = lambda logits=logits, states=states: [sample(logits, states).read() for _ in range(STEPS)]  # noqa: E731
            draw()
            found.append(f"{rows} rows {1e3 * timed(draw) / STEPS:.2f} ms")
        return ", ".join(found)

    for kind in kinds:
        check(f"sampler: {kind}", lambda kind=kind: times(kind))  # type: ignore[misc]


def steps(check: Check, device: torch.device, layers: int, width: int) -> None:
    """Where the time of a decode step goes."""
    model = big(device, layers, width)
    for streams in STREAMS:
        for graphs in (True, False):
            for ahead in (True, False) if graphs else (True,):
                name = f"step: {streams} rows{'' if graphs else ', eager'}{'' if ahead else ', read at once'}"
                check(name, lambda s=streams, g=graphs, a=ahead: step(model, s, g, a))  # type: ignore[misc]
    check("step: 16 rows, one long", lambda: step(model, 16, True, True, longest=2000))
    check("step: kernels of 16 rows", lambda: kernels(model, 16))


def running_rows(model: ChatModel, rows: int, graphs: bool, longest: int = WORDS) -> tuple[Scheduler, BatchedRunner]:
    """A scheduler whose rows are all decoding, with captured steps."""
    forward, has_kv = Forward(model), layers_with_kv(model.module.config)
    assert has_kv is not None
    made = StepGraphs(forward, has_kv, 1 << 33) if graphs else None
    runner = BatchedRunner(forward, has_kv, rows, 0, graphs=made)
    scheduler = Scheduler(runner, lambda *_: None)
    for number in range(rows):
        ids = prompt(longest if number == 0 else WORDS, number)
        scheduler.submit(EngineSequence.of(EngineRequest(ids, 10_000, SamplingParams(temperature=0.0)), None, None))  # type: ignore[arg-type]
    for _ in range(rows + 10):
        scheduler.tick()
    return scheduler, runner


def kernels(model: ChatModel, rows: int) -> str:
    """The kernels of a step, and how long the device is busy with them."""
    scheduler, _ = running_rows(model, rows, True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            scheduler.tick()
        torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.self_device_time_total > 0]
    busy = sum(event.self_device_time_total for event in events) / STEPS / 1e3
    count = sum(event.count for event in events) / STEPS
    most = sorted(events, key=lambda event: -event.self_device_time_total)[:8]
    scheduler.close()
    return f"{count:.0f} kernels, busy {busy:.2f} ms: " + "; ".join(
        f"{event.self_device_time_total / STEPS / 1e3:.2f} ms {event.count / STEPS:.0f}x {event.key[:48]}"
        for event in most
    )


def step(model: ChatModel, rows: int, graphs: bool, ahead: bool, *, longest: int = WORDS) -> str:
    """Milliseconds of a step, of its forward pass on the device and of its sampling, and the waits of the host."""
    scheduler, runner = running_rows(model, rows, graphs, longest)
    runner.runs_ahead = ahead
    scheduler.tick()
    seconds = timed(lambda: [scheduler.tick() for _ in range(STEPS)]) / STEPS
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(STEPS):
                scheduler.tick()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    groups = len(runner.groups)
    waits = sum("synchroniz" in str(warning.message) for warning in caught) / STEPS
    with torch.inference_mode():
        tokens = torch.zeros(rows, dtype=torch.long, device=model.device)
        logits = runner.step(tokens)
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        for _ in range(STEPS):
            runner.step(tokens)
        ended.record()
        ended.synchronize()
        states = [sequence.sampling for sequence in scheduler.running]
        sampling = timed(lambda: [sample(logits, states).read() for _ in range(STEPS)]) / STEPS
    pass_ = begun.elapsed_time(ended) / STEPS
    scheduler.close()
    return (
        f"{1e3 * seconds:.2f} ms a step, {rows / seconds:.0f} tokens/s; forward {pass_:.2f} ms, sample and read "
        f"{1e3 * sampling:.2f} ms; {waits:.2f} waits a step; {groups} groups"
    )
