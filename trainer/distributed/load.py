"""How busy a machine is: processor, memory and GPUs."""

from __future__ import annotations

import psutil
import torch

_MB = 1e6


class Load:
    """The load of one rank's machine and GPU.

    Args:
        device: the rank's.
        local_rank: the rank on its machine; rank 0 reads what is common to all of them.
    """

    def __init__(self, device: torch.device, local_rank: int) -> None:
        self.device, self.local_rank = device, local_rank
        psutil.cpu_percent()  # begins to count

    def read(self) -> dict[str, float]:
        """The processor's utilisation since the last call, memory in use, and the same of the GPU at this moment, under
        the names that MLflow gives them. A GPU's utilisation needs the package nvidia-ml-py."""
        values: dict[str, float] = {}
        if self.local_rank == 0:
            values["cpu_utilization_percentage"] = psutil.cpu_percent()
            values["system_memory_usage_megabytes"] = psutil.virtual_memory().used / _MB
        if self.device.type == "cuda":
            name = f"gpu_{self.local_rank}"
            free, total = torch.cuda.mem_get_info(self.device)
            values[f"{name}_memory_usage_megabytes"] = (total - free) / _MB
            if (utilisation := _utilisation(self.device)) is not None:
                values[f"{name}_utilization_percentage"] = utilisation
        return values


def _utilisation(device: torch.device) -> float | None:
    """Utilisation of a GPU in per cent; None if NVML is missing or does not tell, as for a part of a GPU (MIG)."""
    try:
        from pynvml import NVMLError
    except ModuleNotFoundError:
        return None
    try:
        return float(torch.cuda.utilization(device))
    except (NVMLError, RuntimeError):
        return None
