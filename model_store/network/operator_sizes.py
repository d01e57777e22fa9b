"""What decides the sizes of each ONNX operator's results: the tables that `network_size` reads.

Each operator of the ONNX standard is in exactly one of `REFUSED`, `COUNTING`, `SIZED`, `DIVIDING` and `FOLLOWING`, and
a test walks over the standard to hold that. A later ONNX may bring an operator that is in none; networks that use it
are refused by name until somebody has read its specification and put it into one of these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

#: Operators that rankers do not need and that make the time, memory or result of a run unpredictable: loops, branches,
#: randomness, sequences and strings.
REFUSED = frozenset(
    {
        *("Loop", "Scan", "If", "SequenceMap"),
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
        *("SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"),
        *("SplitToSequence", "ConcatFromSequence", "Optional", "OptionalGetElement", "OptionalHasElement"),
        *("StringNormalizer", "StringConcat", "StringSplit", "RegexFullMatch", "TfIdfVectorizer", "ImageDecoder"),
    }
)
#: Operators whose result is as large as what they count in their inputs' values. They are refused, too.
COUNTING = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})

#: Operators of which some inputs' values decide a size: the places of these inputs.
SIZED: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "AffineGrid": (1,),
        "BlackmanWindow": (0,),
        "CenterCropPad": (1,),
        "Col2Im": (1, 2),
        "ConstantOfShape": (0,),
        "DFT": (1, 2),
        "Expand": (1,),
        "HammingWindow": (0,),
        "HannWindow": (0,),
        "MaxUnpool": (2,),
        "MelWeightMatrix": (0, 1),
        "OneHot": (1,),
        "Pad": (1, 3),
        "Range": (0, 1, 2),
        "ReduceL1": (1,),
        "ReduceL2": (1,),
        "ReduceLogSum": (1,),
        "ReduceLogSumExp": (1,),
        "ReduceMax": (1,),
        "ReduceMean": (1,),
        "ReduceMin": (1,),
        "ReduceProd": (1,),
        "ReduceSum": (1,),
        "ReduceSumSquare": (1,),
        "Reshape": (1,),
        "Resize": (1, 2, 3),
        "STFT": (1, 3),
        "Slice": (1, 2, 3, 4),
        "Split": (1,),
        "Squeeze": (1,),
        "Tile": (1, 2),
        "TopK": (1,),
        "Unsqueeze": (1,),
        "Upsample": (1,),
    }
)
#: Of these, the inputs whose values may vary with the batch. The others must be constants.
MAY_VARY: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "ConstantOfShape": (0,),
        "Expand": (1,),
        "OneHot": (1,),
        "Range": (1,),
        "Reshape": (1,),
        "Tile": (1,),
        "TopK": (1,),
    }
)
#: And of these, the operators that subtract from a size or divide it.
CLIPPING = frozenset(
    {
        *("AffineGrid", "BlackmanWindow", "CenterCropPad", "Col2Im", "DFT", "HammingWindow", "HannWindow", "MaxUnpool"),
        *("MelWeightMatrix", "Pad", "Resize", "STFT", "Slice", "Split", "Upsample"),
    }
)

#: Operators that slide a window over an axis, or divide it. An axis that varies with the batch must come out as it is.
DIVIDING = frozenset(
    {
        *("Attention", "AveragePool", "BitCast", "CausalConvWithState", "Conv", "ConvInteger", "ConvTranspose"),
        *("DeformConv", "DepthToSpace", "LinearAttention", "LpPool", "MaxPool", "MaxRoiPool", "QLinearConv"),
        *("RoiAlign", "SpaceToDepth", "SwiGLU"),
    }
)

#: Operators of which each size is a constant, a size of an input, or a sum, product or maximum of those.
FOLLOWING = frozenset(
    {
        *("Abs", "Acos", "Acosh", "Add", "And", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh"),
        *("BatchNormalization", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"),
        *("Cast", "CastLike", "Ceil", "Celu", "Clip", "Concat", "Constant", "Cos", "Cosh", "CumProd", "CumSum"),
        *("DequantizeLinear", "Det", "Div", "Dropout", "DynamicQuantizeLinear"),
        *("Einsum", "Elu", "Equal", "Erf", "Exp", "EyeLike", "Flatten", "Floor"),
        *("GRU", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalLpPool"),
        *("GlobalMaxPool", "Greater", "GreaterOrEqual", "GridSample", "GroupNormalization"),
        *("HardSigmoid", "HardSwish", "Hardmax", "Identity", "InstanceNormalization", "IsInf", "IsNaN"),
        *("LRN", "LSTM", "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log"),
        *("LogSoftmax", "LpNormalization", "MatMul", "MatMulInteger", "Max", "Mean", "MeanVarianceNormalization"),
        *("Min", "Mish", "Mod", "Mul", "Neg", "NegativeLogLikelihoodLoss", "Not", "Or", "PRelu", "Pow"),
        *("QLinearMatMul", "QuantizeLinear", "RMSNormalization", "RNN", "Reciprocal", "Relu", "ReverseSequence"),
        *("RotaryEmbedding", "Round", "Scatter", "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid"),
        *("Sign", "Sin", "Sinh", "Size", "Softmax", "SoftmaxCrossEntropyLoss", "Softplus", "Softsign"),
        *("Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "TensorScatter"),
        *("ThresholdedRelu", "Transpose", "Trilu", "Where", "Xor"),
    }
)

#: Operators by which a size may be computed from sizes: they move numbers, add, multiply or take the largest. Each
#: comes with the places of the inputs that may vary with the batch; the others must be constants.
VARYING_VALUES: Mapping[str, tuple[int, ...] | None] = MappingProxyType(
    {
        **dict.fromkeys(("Add", "Mul", "Max", "Sum", "Concat", "Equal"), None),  # all of them
        **dict.fromkeys(
            ("Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile"), (0,)
        ),
        **dict.fromkeys(("Transpose", "Unsqueeze", "ReduceMax", "ReduceProd", "ReduceSum"), (0,)),
        "Where": (1, 2),
    }
)
#: And those by which it may be computed from constants alone.
CONSTANT_VALUES = frozenset(
    {*VARYING_VALUES, "Abs", "ConstantOfShape", "Div", "Min", "Mod", "Neg", "Range", "ReduceMin", "Sub"}
)
