"""Which optimizer FBGEMM fuses into the table's backward, on which device."""

from typing import Any

from fbgemm_gpu.split_embedding_configs import EmbOptimType

from embeddings.config import TableConfig, keeps_squares, optimizer_name

_CPU = {
    "sgd": EmbOptimType.EXACT_SGD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}
_CUDA = _CPU | {
    "adam": EmbOptimType.ADAM,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
}


def ignores_zero_gradients(config: TableConfig) -> bool:
    """Whether a gradient of zero leaves rows and their state unchanged, to the bit.

    Adam's moments decay.
    """
    return keeps_squares(config)


def fused_params(config: TableConfig, device_type: str) -> dict[str, Any]:
    """The fused-optimizer parameters that a TorchRec sharder takes.

    Raises ValueError for a pair of optimizer and device that FBGEMM does not have.
    """
    available = _CUDA if device_type == "cuda" else _CPU
    name = optimizer_name(config)
    if name not in available:
        names = ", ".join(sorted(available))
        raise ValueError(
            f"table.optimizer={name} does not exist on {device_type}: FBGEMM has {names} there"
        )
    params = {
        "optimizer": available[name],
        "learning_rate": config.learning_rate,
        "eps": config.eps,
    }
    if "adam" in name:
        params["beta1"] = config.beta1
        params["beta2"] = config.beta2
    return params
