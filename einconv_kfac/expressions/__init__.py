"""Operations of a convolution as einsum expressions, one module each.

``einsum_expression(...)`` of a module returns ``(equation, operands, shape)``; the result of
the operation is ``torch.einsum(equation, *operands).reshape(shape)``.
"""

from einconv_kfac.network.cache import CacheInfo, cache_clear, cache_info

__all__ = ["CacheInfo", "cache_clear", "cache_info"]
