"""Load GGUF and safetensors files into a model and a tokenizer, without copying weights.

    files = ModelFiles.from_model(model, store.blob_path)
    loaded = load(files, device="cpu")

The model is an unmodified class of `mlx_lm.models`. Read `loader` first, then `gguf` or
`safetensors`, then `tokenizer`.
"""

from modelpack_engine.patches import mlx_lm_imports
from modelpack_engine.platform import blas

# Must run before the modules below import MLX and mlx-lm.
blas.prepare()
mlx_lm_imports.prepare()

from modelpack_engine.models.files import ModelFiles as ModelFiles  # noqa: E402
from modelpack_engine.models.loader import LoadedModel as LoadedModel  # noqa: E402
from modelpack_engine.models.loader import load as load  # noqa: E402
from modelpack_engine.models.tokenizer import Tokenizer as Tokenizer  # noqa: E402
