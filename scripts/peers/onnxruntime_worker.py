"""ONNX Runtime GenAI in its own process; see worker.py. It speculates for single rows alone."""

import json
import time
from functools import cache
from pathlib import Path

import numpy
import onnx
import onnxruntime_genai as genai
from serve import serve

MATRIX_PRODUCTS = ("MatMulNBits", "MatMul", "Gemm")


def load(message: dict):
    session = {"intra_op_num_threads": message["threads"], "inter_op_num_threads": 1}
    overlay: dict = {"model": {"decoder": {"session_options": session}}}
    folder = message["target"]
    if message["draft"] is not None:  # a folder that holds both
        folder = message["draft"]
        overlay["model"]["draft"] = {"session_options": session}
    config = genai.Config(folder)
    config.overlay(json.dumps(overlay))
    return genai.Model(config), forward_bytes(message["target"])


@cache
def forward_bytes(folder: str) -> int:
    """Bytes of the tensors that matrix products read: codes, scales and zero points."""
    graph = onnx.load(Path(folder) / "model.onnx", load_external_data=False).graph
    read = {name for node in graph.node if node.op_type in MATRIX_PRODUCTS for name in node.input}
    sizes = {
        tensor.name: onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * int(numpy.prod(tensor.dims))
        for tensor in graph.initializer
    }
    return sum(size for name, size in sizes.items() if name in read)


def generate(model, message: dict) -> dict:
    prompts, k, ngram = message["prompts"], message["k"], message["ngram"]
    length = len(prompts[0])
    params = genai.GeneratorParams(model)
    search = {"do_sample": message["sampled"], "max_length": length + message["new_tokens"], "batch_size": len(prompts)}
    if message["sampled"]:
        search |= {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "random_seed": message["seed"]}
    params.set_search_options(**search)
    if k is not None:
        params.set_speculative_options(max_draft_tokens=k, **({} if ngram is None else {"ngram_size": ngram}))
    ids = numpy.array(prompts, dtype=numpy.int32)
    started, cpu_started = time.perf_counter(), time.process_time()
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    steps = 0
    while not generator.is_done():
        generator.generate_next_token()
        steps += 1
    rows = [[int(i) for i in generator.get_sequence(row)[length:]] for row in range(len(prompts))]
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    answer = {"ids": rows, "seconds": seconds, "cpu_seconds": cpu_seconds}
    answer |= {"steps": steps, "accepted": 0, "draft_s": None, "target_s": None}
    if k is not None:
        stats = generator.get_speculative_stats()
        accepted = int(stats["draft_tokens_accepted"])
        answer |= {"steps": message["new_tokens"] - accepted, "accepted": accepted}
    return answer


if __name__ == "__main__":
    serve(load, generate)
