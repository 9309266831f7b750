"""transformers' own server on a CPU, `transformers serve`, with an enabled model where a drafter is named.

    pip install "transformers[serving]"
    python scripts/serve_transformers.py specdec/assets/target --port 8081
    python scripts/serve_transformers.py specdec/assets/target --port 8082 --drafter specdec/assets/draft
    specdec audit lossless --reference http://127.0.0.1:8081 --candidate http://127.0.0.1:8082

A request's temperature has no effect on that server where the model's generation config says do_sample=False, which is
the default. So it is set here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from transformers import PreTrainedModel
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

import specdec


def manager_of(drafter: str | None) -> type[model_manager.ModelManager]:
    """The class that loads a server's model. drafter: as specdec.enable takes it; None: the model stays as it is."""

    class Manager(model_manager.ModelManager):
        def _load_model(
            self,
            model_id_and_revision: str,
            tqdm_class: type | None = None,
            progress_callback: Callable | None = None,
            gguf_file: str | None = None,
        ) -> PreTrainedModel:
            model = super()._load_model(model_id_and_revision, tqdm_class, progress_callback, gguf_file)
            model.generation_config.do_sample = True
            if drafter is not None:
                specdec.enable(model, drafter)
            return model

    return Manager


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or a hub id")
    parser.add_argument("--drafter", help="a folder or a hub id, prompt_lookup, or suffix; default: no speculation")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args(arguments)
    model_manager.ModelManager = manager_of(args.drafter)  # type: ignore[misc]  # Serve looks it up when it is called
    Serve(args.model, device="cpu", dtype="float32", port=args.port)


if __name__ == "__main__":
    main()
