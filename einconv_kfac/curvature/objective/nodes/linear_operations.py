"""Operations that are linear in everything that depends on the model."""

# fmt: off
LINEAR = frozenset(
    (
        "AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "Add", "AddBroadcast", "Alias", "AsStrided",
        "AvgPool2D", "AvgPool3D", "BackwardHookFunction", "Cat", "ChannelShuffle", "Clone",
        "Col2Im", "Complex", "Conj", "ConjPhysical", "ConstantPadNd", "Copy", "CopySlices",
        "Cumsum", "Deg2Rad", "DiagEmbed", "Diagonal", "DiagonalBackward", "Expand", "FftC2C",
        "FftC2R", "FftR2C", "Flip", "Fmod", "Frac", "Gather", "Im2Col", "Imag", "Index", "IndexAdd",
        "IndexFill", "IndexPut", "IndexSelect", "MaskedFill", "MaskedScatter", "MaskedSelect",
        "Mean", "NativeDropout", "Neg", "NllLoss", "NllLoss2D", "NllLoss2DBackward",
        "NllLossBackward", "Permute", "PixelShuffle", "PixelUnshuffle", "Rad2Deg", "Real",
        "ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D", "Remainder", "Repeat",
        "RepeatInterleave", "ReplicationPad1D", "ReplicationPad2D", "ReplicationPad3D",
        "ReshapeAlias", "Roll", "Rot90", "Rsub", "Scatter", "ScatterAdd", "Select",
        "SelectBackward", "Slice", "SliceBackward", "SliceScatter", "Split", "SplitWithSizes",
        "Squeeze", "Stack", "Sub", "Sum", "T", "ToCopy", "Trace", "Transpose", "Tril", "Triu",
        "Unbind", "Unfold", "UnfoldBackward", "UnsafeSplit", "UnsafeView", "Unsqueeze",
        "UpsampleBicubic2D", "UpsampleBicubic2DAa", "UpsampleBilinear2D", "UpsampleBilinear2DAa",
        "UpsampleLinear1D", "UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D",
        "UpsampleNearestExact1D", "UpsampleNearestExact2D", "UpsampleNearestExact3D",
        "UpsampleTrilinear3D", "View", "ViewAsComplex", "ViewAsReal", "Where", "_DDPSink",
    )
)
# fmt: on
"""Names of operations, as `kind_of_node` returns them; of remainders the multiples are constant."""
