"""What a device is good at: prices of operations, sizes of parts, and paths that it may take."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

NARROW_VECTORS_PRICE = 2.0
"""How many times longer large products take by MKL than by oneDNN, on half as wide vectors."""


@dataclass(frozen=True)
class Prices:
    """Seconds per unit of work in float32; only their ratios decide between algorithms.

    Args:
        mac: Seconds of a multiply-accumulate in a large matrix product.
        half_speed_width: Rows and columns of a matrix product at half of the full speed.
        copied: Seconds per element that is copied on the way to a product.
        written: Seconds per element that is scattered on the way from a product.
        call: Seconds per operation that is started.
        region: Seconds that threads wait for each other at the end of an operation.
        task: Seconds to start a task on another thread and to wait for it.
    """

    mac: float
    half_speed_width: float
    copied: float
    written: float
    call: float
    region: float = 0.0
    task: float = 0.0


@dataclass(frozen=True)
class DeviceProfile:
    """What decides on one device how factors are computed.

    Args:
        device: The type of the device, as in `torch.device`.
        prices: What operations cost.
        smallest_chunk_elements: Elements to process at a time at least, if there are as many.
        largest_chunk_elements: Elements to process at a time at most: they fit a cache, or
            occupy the whole device.
        panel_rows: Rows of a symmetric matrix that one product computes. Narrow panels save up
            to half of the multiplications; wide ones are faster products.
        strip_rows: Rows that are copied to columns at a time.
        is_cached: Whether work is cut into parts that fit a cache, and operations are cheap to
            start, so that many small ones are worthwhile.
        is_host: Whether tensors are in the memory of the host, and can view its arrays.
        has_exact_weight_gradients: Whether weight gradients of convolutions have the full
            precision of their dtype, and add in the same order each time.
        has_mixed_products: Whether matrices in bfloat16 and float16 are multiplied with sums and
            results in float32.
        mixed_mac_price: Price of a multiplication in these products, relative to float32.
        tf32_mac_price: Price of a multiplication of float32 matrices that torch's settings allow to
            round to TF32, relative to float32; 1 on devices that never do.
        runs_triton: Whether kernels in Triton run on it, if that is installed.
        multiplies_by_onednn: Whether oneDNN multiplies large float32 matrices faster than
            torch's ordinary routine.
        shared_operation_gain: Gain of one more thread where threads share each operation.
        python_share: How much longer a call takes for each other thread that runs Python, in calls.
        mkl_half_speed_width: Rows and columns of a large product at half of the full speed by
            MKL, where that full speed is oneDNN's; 0 where MKL does not reach it.
    """

    device: str
    prices: Prices
    smallest_chunk_elements: int
    largest_chunk_elements: int
    panel_rows: int
    strip_rows: int
    is_cached: bool = False
    is_host: bool = False
    has_exact_weight_gradients: bool = False
    has_mixed_products: bool = False
    mixed_mac_price: float = 1.0
    tf32_mac_price: float = 1.0
    runs_triton: bool = False
    multiplies_by_onednn: bool = False
    shared_operation_gain: float = 0.7
    python_share: float = 1.5
    mkl_half_speed_width: int = 0

    def of_unknown(self) -> DeviceProfile:
        """Return the profile for devices without one: these prices, and no paths of its own."""
        return replace(
            self,
            has_mixed_products=False,
            mixed_mac_price=1.0,
            tf32_mac_price=1.0,
            runs_triton=False,
        )

    def chunk_elements(self, elements: int) -> int:
        """Return how many of ``elements`` to process at a time, within the profile's bounds."""
        return min(max(elements, self.smallest_chunk_elements), self.largest_chunk_elements)

    def matmul_price(self, dtype: torch.dtype, width: float | None = None) -> float:
        """Return the price of a multiplication by torch's ordinary routine, relative to `prices`.

        Where vectors are double-pumped, MKL comes close to oneDNN in large products only. Batches
        of small products were fitted with the same price on all processors.

        Args:
            dtype: The dtype of the products.
            width: Rows and columns of the products, if all are large.
        """
        if not self.multiplies_by_onednn or dtype == torch.float64:
            return 1.0
        if width and self.mkl_half_speed_width:
            return 1 + self.mkl_half_speed_width / width
        return NARROW_VECTORS_PRICE
