"""GGUF files beside llama.cpp itself: the same tokens, the same greedy text, logits as near as its kernels come.

Needs llama-cpp-python, which pip compiles: `pip install -e '.[bench]'` (cmake and a C++ compiler). Each model is
exported in fp32 and read by llama.cpp on one thread with a key-value cache in fp32.

    python benchmarks/gguf_llama_cpp.py runs/novel my/model …
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import RESULTS, save_result

import onecard
from onecard.handover.fidelity import TEXTS
from onecard.model.folder import load_model_folder
from onecard.run.find import find_model_folder

SAMPLES = (
    *TEXTS,
    "Hello   world\n\n\n  It's 2024's \"best\" 12345 day!! don't DON'T I'M we'LL",
    "中文字符测试，数字１２３和标点。混合English和中文 text 🎉🎉 émigré",
    "\t\ttabs\r\nCRLF  \n trailing  ",
    "ʼn Ünïcödé ﬀ ½ ٣٤ ไทย 한국어 日本語",
)
_PROMPT, _NUM_NEW, _F32 = "Once upon a time", 48, 0


def measure(name: str) -> dict[str, Any]:
    """Compares one model."""
    import llama_cpp

    model, tokenizer = load_model_folder(find_model_folder(Path(name), "best"), torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        written = onecard.export(name, "gguf", dtype="f32", output=Path(folder) / "out")
        (file,) = Path(written.folder).glob("*.gguf")
        other = llama_cpp.Llama(
            str(file), n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=_F32, type_v=_F32
        )
        same_tokens = [
            other.tokenize(text.encode("utf-8"), add_bos=False) == tokenizer.encode(text, add_special_tokens=False)
            for text in SAMPLES
        ]
        prompt = tokenizer.encode(_PROMPT)
        other.eval(prompt)
        with torch.no_grad():
            own = model(torch.tensor([prompt])).logits[0].numpy()
            ids = model.generate(
                torch.tensor([prompt]), max_new_tokens=_NUM_NEW, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0].tolist()[len(prompt) :]
        difference = float(np.abs(np.array(other.scores[: len(prompt)]) - own).max())
        other.reset()
        found = [token for token, _ in zip(other.generate(prompt, temp=0.0, repeat_penalty=1.0), ids, strict=False)]
        other.close()
    return {
        "model_type": model.config.model_type,
        "same_tokens": f"{sum(same_tokens)} of {len(SAMPLES)} texts",
        "largest_difference": difference,
        "logit_range": float(own.max() - own.min()),
        "same_greedy_tokens": next((i for i, token in enumerate(ids) if [token] != found[i : i + 1]), len(ids)),
        "greedy_tokens": len(ids),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="run folders or model folders")
    result = {}
    for name in parser.parse_args().models:
        row = result[Path(name).name] = measure(name)
        print(
            f"{Path(name).name:16} tokens {row['same_tokens']}, greedy {row['same_greedy_tokens']} of "
            f"{row['greedy_tokens']}, logits within {row['largest_difference']:.2g} of {row['logit_range']:.3g}",
            flush=True,
        )
    save_result(RESULTS / "gguf_llama_cpp.json", result)


if __name__ == "__main__":
    main()
