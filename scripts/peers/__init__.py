"""Engines that generate text, measured in turns: transformers, specdec, OpenVINO GenAI."""
