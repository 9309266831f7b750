"""OpenVINO GenAI in its own process; see worker.py."""

import time
from functools import cache
from pathlib import Path

import numpy
import openvino
import openvino_genai
from serve import serve

CACHE_GB = 1
ALL_IDS = 1 << 30  # top_k: the whole vocabulary
ALL_TOKENS = (1 << 63) - 1  # of prompts in one forward, which is its own default for a single user
MAX_NGRAM = 3  # its own default


def load(message: dict):
    threads, draft = message["threads"], message["draft"]
    properties = {"INFERENCE_NUM_THREADS": threads}
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens = CACHE_GB, ALL_TOKENS
    scheduler.enable_prefix_caching = False  # every call must read its prompt, although rounds repeat prompts
    properties["scheduler_config"] = scheduler
    if draft is not None:
        properties["draft_model"] = openvino_genai.draft_model(draft, "CPU", INFERENCE_NUM_THREADS=threads)
    if message["lookup"]:
        properties["prompt_lookup"] = True
    pipeline = openvino_genai.LLMPipeline(message["target"], "CPU", **properties)
    return (pipeline, message["lookup"]), forward_bytes(message["target"])


@cache
def forward_bytes(folder: str) -> int:
    """Bytes of the constants that matrix products read: codes, scales and zero points."""
    model = openvino.Core().read_model(Path(folder) / "openvino_model.xml")
    sizes: dict[str, int] = {}
    found = [op for op in model.get_ordered_ops() if op.get_type_name() == "MatMul"]
    sources = [op.input_value(1).get_node() for op in found]
    while sources:
        node = sources.pop()
        if node.get_type_name() == "Constant":
            sizes[node.get_friendly_name()] = node.get_byte_size()
        elif node.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape"):  # how 4-bit weights are written
            sources += [value.get_node() for value in node.input_values()]
    return sum(sizes.values())


def generate(loaded, message: dict) -> dict:
    pipeline, lookup = loaded
    k = message["k"]
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = message["new_tokens"], True
    if k is not None:
        config.num_assistant_tokens = k
    if lookup:
        config.max_ngram_size = MAX_NGRAM
    if message["sampled"]:
        config.do_sample, config.temperature, config.top_p, config.top_k = True, 1.0, 1.0, ALL_IDS
        config.rng_seed = message["seed"]
    ids = numpy.array(message["prompts"], dtype=numpy.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
    started, cpu_started = time.perf_counter(), time.process_time()
    results = pipeline.generate(inputs, config)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    answer = {"ids": [list(row) for row in results.tokens], "seconds": seconds, "cpu_seconds": cpu_seconds}
    if lookup:  # it reports no times; each step of a single row emits one id of the target's own
        emitted = list(results.perf_metrics.raw_metrics.m_batch_sizes)
        accepted = sum(emitted) - len(emitted) if len(ids) == 1 else None
        return answer | {"target_s": None, "draft_s": None, "steps": len(emitted), "accepted": accepted}
    return answer | metrics(results, speculative=k is not None)


def metrics(results, speculative: bool) -> dict:
    """Seconds of the models' forwards, the prompt's included; the numbers of steps and of accepted draft ids."""
    perf = results.perf_metrics
    steps = len(perf.raw_metrics.token_infer_durations)
    if not speculative:
        return {"target_s": total(perf), "draft_s": 0.0, "steps": steps, "accepted": 0}
    both = results.extended_perf_metrics
    parts = {"target_s": total(both.main_model_metrics), "draft_s": total(both.draft_model_metrics)}
    return parts | {"steps": steps, "accepted": both.get_num_accepted_tokens()}


def total(perf) -> float:
    return sum(perf.raw_metrics.inference_durations) / 1e6


if __name__ == "__main__":
    serve(load, generate)
