"""Operations of a convolution as einsum expressions, one module per operation.

``einsum_expression(...)`` of a module returns ``(equation, operands, shape)``; the operation's
result is ``torch.einsum(equation, *operands).reshape(shape)``.
"""

from einconv_kfac.network.cache import CacheInfo, cache_clear, cache_info

__all__ = ["CacheInfo", "cache_clear", "cache_info"]
