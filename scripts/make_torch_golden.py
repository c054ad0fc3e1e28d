"""Make tests/golden/torch_tensors.bin, what PyTorch itself writes, for tests of the reader.

Needs torch; the tests (tests/checkpoint/test_torch_file.py) do not.
"""

from pathlib import Path

import torch  # pyright: ignore[reportMissingImports]


def main() -> None:
    """Tensors of several dtypes, a view with strides, one with an offset, a parameter, a tie."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "f32": base,
        "f16": base.half(),
        "bf16": base.bfloat16(),
        "i8": (base - 12).to(torch.int8),
        "i32": base.to(torch.int32),
        "transposed": base.half().T,
        "offset": base.half()[2:],
        "parameter": torch.nn.Parameter(base.half(), requires_grad=False),
        "tied": base,
        "scalar": torch.tensor(7.0),
    }
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_buffer(name, tensor)
    state = module.state_dict()  # an OrderedDict with a _metadata attribute, as checkpoints have
    state["parameter"] = tensors["parameter"]
    torch.save(state, Path(__file__).parents[1] / "tests" / "golden" / "torch_tensors.bin")


if __name__ == "__main__":
    main()
