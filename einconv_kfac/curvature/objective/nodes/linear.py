"""Operations that are linear in everything that depends on the model."""

LINEAR = frozenset(
    (
        "Add AddBroadcast Sub Rsub Neg Sum Mean View UnsafeView ReshapeAlias Clone Slice Select "
        "Index IndexSelect IndexAdd IndexPut IndexFill Gather ScatterAdd Scatter "
        "Transpose T Permute Unsqueeze Squeeze Expand Repeat RepeatInterleave Cat Stack Split "
        "SplitWithSizes UnsafeSplit Unbind Unfold Im2Col Col2Im ToCopy Copy CopySlices AsStrided "
        "Alias MaskedFill MaskedScatter MaskedSelect Where Tril Triu Flip Roll Diagonal DiagEmbed "
        "Trace ConstantPadNd ReflectionPad1D ReflectionPad2D ReplicationPad1D ReplicationPad2D "
        "Cumsum AvgPool2D AdaptiveAvgPool2D UpsampleBilinear2D UpsampleNearest2D UpsampleNearest1D "
        "UpsampleTrilinear3D UpsampleNearest3D NllLoss NllLoss2D Real Imag ViewAsReal "
        "ViewAsComplex Complex NativeDropout BackwardHookFunction"
    ).split()
)
"""Names of operations, as `kind_of_node` returns them."""
