"""Which architecture learns most from the same tokens: the candidates that vLLM and llama.cpp load, at equal size.

Tiny Shakespeare by characters, 1,000 steps of 12 x 64, Muon with AdamW, linear decay to zero; MLP widths are chosen so
that all have about 0.8M parameters. Loss is exact over the held-out tenth; seconds are those of training steps.

    python benchmarks/architectures.py path/to/tinyshakespeare.txt
"""

import argparse
from pathlib import Path
from typing import Any

import shakespeare
from record import write_result

SHAPE = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
TRAINING = {"muon_momentum": 0.9, "learning_rate": 0.01, "weight_decay": 0.02, "decay_ratio": 1.0, "max_steps": 1000}
CANDIDATES: dict[str, dict[str, Any]] = {
    "qwen3: QK-norm, GQA, SwiGLU, RoPE": {"model_config": {"model_type": "qwen3"}, **GROUPED, "intermediate_size": 384},
    "qwen3 without GQA": {
        "model_config": {"model_type": "qwen3"},
        **SHAPE,
        "num_key_value_heads": 4,
        "intermediate_size": 340,
    },
    "llama: GQA, SwiGLU, RoPE": {"model_config": {"model_type": "llama"}, **GROUPED, "intermediate_size": 384},
    "olmo2: QK-norm, norms after": {"model_config": {"model_type": "olmo2"}, **GROUPED, "intermediate_size": 384},
    "gpt2: GELU, learned positions": {"model_config": {"model_type": "gpt2"}, **SHAPE},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    arguments = parser.parse_args()
    result = {}
    for name, shape in CANDIDATES.items():
        run = shakespeare.train(arguments.text, {**TRAINING, **shape, "tie_word_embeddings": True}, seed=1337)
        result[name] = run
        print(f"{name:36} {run['loss']:.4f}  {run['parameters']:,} parameters  {run['training_s']:.0f} s")
    write_result("architectures", result)


if __name__ == "__main__":
    main()
