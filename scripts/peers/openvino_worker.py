"""OpenVINO GenAI in its own process and virtual environment: a line of JSON in, a line of JSON out."""

import json
import os
import sys
import time

import numpy
import openvino
import openvino_genai

CACHE_GB = 1
ALL_IDS = 1 << 30  # top_k: the whole vocabulary
ALL_TOKENS = (1 << 63) - 1  # of prompts in one forward, which is its own default for a single user


def load(target: str, draft: str | None, threads: int):
    properties = {"INFERENCE_NUM_THREADS": threads}
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_batched_tokens = CACHE_GB, ALL_TOKENS
    scheduler.enable_prefix_caching = False  # every call must read its prompt, although rounds repeat prompts
    properties["scheduler_config"] = scheduler
    if draft is not None:
        properties["draft_model"] = openvino_genai.draft_model(draft, "CPU", INFERENCE_NUM_THREADS=threads)
    return openvino_genai.LLMPipeline(target, "CPU", **properties)


def generate(pipeline, prompts: list[list[int]], new_tokens: int, sampled: bool, seed: int, k: int | None) -> dict:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos = new_tokens, True
    if k is not None:
        config.num_assistant_tokens = k
    if sampled:
        config.do_sample, config.temperature, config.top_p, config.top_k = True, 1.0, 1.0, ALL_IDS
        config.rng_seed = seed
    ids = numpy.array(prompts, dtype=numpy.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
    started = time.perf_counter()
    results = pipeline.generate(inputs, config)
    seconds = time.perf_counter() - started
    return {"ids": [list(row) for row in results.tokens], "seconds": seconds} | metrics(results, k)


def metrics(results, k: int | None) -> dict:
    """Seconds of the models' forwards, the prompt's included; the numbers of steps and of accepted draft ids."""
    perf = results.perf_metrics
    steps = len(perf.raw_metrics.token_infer_durations)
    if k is None:
        return {"target_s": total(perf), "draft_s": 0.0, "steps": steps, "accepted": 0}
    both = results.extended_perf_metrics
    accepted = both.get_num_accepted_tokens()
    parts = {"target_s": total(both.main_model_metrics), "draft_s": total(both.draft_model_metrics)}
    return parts | {"steps": steps, "accepted": accepted}


def total(perf) -> float:
    return sum(perf.raw_metrics.inference_durations) / 1e6


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to the log
    pipelines: dict = {}
    for line in sys.stdin:
        message = json.loads(line)
        try:
            if message["op"] == "load":  # once: one pipeline serves every K
                if message["name"] not in pipelines:
                    pipelines[message["name"]] = load(message["target"], message["draft"], message["threads"])
                answer = {}
            else:
                answer = generate(
                    pipelines[message["name"]], *(message[n] for n in ("prompts", "new_tokens", "sampled", "seed", "k"))
                )
        except Exception as error:  # the parent process raises it
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
