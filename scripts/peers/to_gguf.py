"""llama.cpp's own converter: to_gguf.py SOURCE MODEL FILE, where SOURCE is llama.cpp's folder.

It refuses tokenizers that it does not know. Ids go in and out here, so any known one serves.
"""

import runpy
import sys

source, model, file = sys.argv[1:]
sys.path[:0] = [source, f"{source}/gguf-py"]

from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
sys.argv = [f"{source}/convert_hf_to_gguf.py", model, "--outtype", "bf16", "--outfile", file]
runpy.run_path(sys.argv[0], run_name="__main__")
