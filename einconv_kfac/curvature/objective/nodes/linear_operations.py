"""Operations that are linear in everything that depends on the model."""

# fmt: off
LINEAR = frozenset(
    (
        "AdaptiveAvgPool2D", "Add", "AddBroadcast", "Alias", "AsStrided", "AvgPool2D",
        "BackwardHookFunction", "Cat", "Clone", "Col2Im", "Complex", "Conj", "ConjPhysical",
        "ConstantPadNd", "Copy", "CopySlices", "Cumsum", "DiagEmbed", "Diagonal", "Expand",
        "FftC2C", "FftC2R", "FftR2C", "Flip", "Gather", "Im2Col", "Imag", "Index", "IndexAdd",
        "IndexFill", "IndexPut", "IndexSelect", "MaskedFill", "MaskedScatter", "MaskedSelect",
        "Mean", "NativeDropout", "Neg", "NllLoss", "NllLoss2D", "Permute", "Real",
        "ReflectionPad1D", "ReflectionPad2D", "Repeat", "RepeatInterleave", "ReplicationPad1D",
        "ReplicationPad2D", "ReshapeAlias", "Roll", "Rsub", "Scatter", "ScatterAdd", "Select",
        "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack", "Sub", "Sum", "T", "ToCopy",
        "Trace", "Transpose", "Tril", "Triu", "Unbind", "Unfold", "UnsafeSplit", "UnsafeView",
        "Unsqueeze", "UpsampleBilinear2D", "UpsampleNearest1D", "UpsampleNearest2D",
        "UpsampleNearest3D", "UpsampleTrilinear3D", "View", "ViewAsComplex", "ViewAsReal", "Where",
    )
)
# fmt: on
"""Names of operations, as `kind_of_node` returns them."""
