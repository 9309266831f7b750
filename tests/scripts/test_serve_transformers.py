"""serve_transformers: what the server's model manager loads. The server itself takes packages that no test needs."""

from __future__ import annotations

from typing import Any

import pytest
import serve_transformers
import torch
from transformers.cli.serving import model_manager

import specdec
from specdec.utils import embedded


@pytest.mark.parametrize("drafter", ["prompt_lookup", None])
def test_the_servers_model_samples_and_is_enabled_where_a_drafter_is_named(
    drafter: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []
    monkeypatch.setattr(serve_transformers, "Serve", lambda model, **options: served.append((model, options)))
    monkeypatch.setattr(model_manager, "ModelManager", model_manager.ModelManager)  # restored afterwards
    named = [] if drafter is None else ["--drafter", drafter]
    serve_transformers.main([str(embedded.TARGET), "--port", "8081", *named])
    [(folder, options)] = served
    assert options == {"device": "cpu", "dtype": "float32", "port": 8081}
    manager = model_manager.ModelManager(device=options["device"], dtype=options["dtype"], force_model=folder)
    [loaded] = manager.loaded_models.values()
    assert loaded.model.generation_config.do_sample
    loaded.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    assert (specdec.last_stats(loaded.model) is not None) == (drafter is not None)
