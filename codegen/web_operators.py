"""The operators of onnxruntime-web, as data: what its providers have kernels for, in which versions.

An entry is an op and the versions of its definition: ``7-12`` are all that came with opsets 7 to 12, and
``13+`` is the one of opset 13, in any model that still means it. A later definition of the op is another
one, whatever it changed: so a kernel of ``21+`` does not run a ``Transpose`` of opset 23.
"""

VERSION = "1.30.0"
"""Of onnxruntime-web."""

WASM = {
    "": """
Abs 6-12,13+ Acos 7-21,22+ Acosh 9-21,22+ Add 7-13,14+ Affine 1+ AffineGrid 20+ And 7+ ArgMax 1-12,13+
ArgMin 1-12,13+ Asin 7-21,22+ Asinh 9-21,22+ Atan 7-21,22+ Atanh 9-21,22+ Attention 23,24+
AveragePool 7-21,22+ BatchNormalization 7-14,15+ BitCast 26+ BitShift 11+ BitwiseAnd 18+ BitwiseNot 18+
BitwiseOr 18+ BitwiseXor 18+ BlackmanWindow 17+ Cast 6-24,25+ Ceil 6-12,13+ Celu 12+ Clip 6-12,13+
Col2Im 18+ Compress 9-10,11+ Concat 4-12,13+ ConcatFromSequence 11+ ConstantOfShape 9-24,25+ Conv 1-21,22+
ConvInteger 10+ ConvTranspose 1-21,22+ Cos 7-21,22+ Cosh 9-21,22+ Crop 1+ CumProd 26+ CumSum 11-13,14+
DFT 17-19,20+ DeformConv 19-21,22+ DepthToSpace 1-12,13+ DequantizeLinear 10-24,25+ Det 11-21,22+
Div 7-13,14+ Dropout 7-21,22+ DynamicQuantizeLinear 11+ DynamicSlice 1+ Einsum 12+ Elu 6-21,22+
Equal 7-18,19+ Erf 9-12,13+ Exp 6-12,13+ Expand 8-12,13+ EyeLike 9-21,22+ Flatten 1-24,25+ Floor 6-12,13+
GRU 7-21,22+ Gather 1-12,13+ GatherElements 11-12,13+ GatherND 11-12,13+ Gelu 20+ Gemm 7-12,13+
GlobalAveragePool 1-21,22+ GlobalLpPool 2+ GlobalMaxPool 1-21,22+ Greater 7-12,13+
GreaterOrEqual 12-15,16+ GridSample 16-21,22+ HammingWindow 17+ HannWindow 17+ HardSigmoid 6-21,22+
Hardmax 1-12,13+ Identity 1-24,25+ If 1-24,25+ ImageScaler 1+ InstanceNormalization 6-21,22+
IsInf 10-19,20+ IsNaN 9-19,20+ LRN 1-12,13+ LSTM 7-21,22+ LayerNormalization 1-16,17+ LeakyRelu 6-15,16+
Less 7-12,13+ LessOrEqual 12-15,16+ Log 6-12,13+ LogSoftmax 1-12,13+ Loop 1-24,25+
LpNormalization 1-21,22+ LpPool 2-21,22+ MatMul 1-12,13+ MatMulInteger 10+ Max 6-12,13+ MaxPool 1-21,22+
MaxRoiPool 1+ MaxUnpool 9-21,22+ Mean 6-12,13+ MeanVarianceNormalization 1-12,13+ MelWeightMatrix 17+
Min 6-12,13+ Mod 10-12,13+ Mul 7-13,14+ Multinomial 7+ Neg 6-12,13+ NonMaxSuppression 10,11+
NonZero 9-12,13+ Not 1+ OneHot 9-10,11+ Optional 15+ OptionalGetElement 15-17,18+
OptionalHasElement 15-17,18+ Or 7+ PRelu 7-15,16+ Pad 2-24,25+ ParametricSoftplus 1+ Pow 7-14,15+
QLinearConv 10+ QLinearMatMul 10-20,21+ QuantizeLinear 10-24,25+ RMSNormalization 23+ RNN 7-21,22+
RandomNormal 1+ RandomNormalLike 1+ RandomUniform 1+ RandomUniformLike 1+ Range 11-26,27+
Reciprocal 6-12,13+ ReduceL1 1-17,18+ ReduceL2 1-17,18+ ReduceLogSum 1-17,18+ ReduceLogSumExp 1-17,18+
ReduceMax 1-19,20+ ReduceMean 1-17,18+ ReduceMin 1-19,20+ ReduceProd 1-17,18+ ReduceSum 1-12,13+
ReduceSumSquare 1-17,18+ RegexFullMatch 20+ Relu 6-13,14+ Reshape 1-24,25+ Resize 10-18,19+
ReverseSequence 10+ RoiAlign 10-15,16+ RotaryEmbedding 23+ Round 11-21,22+ STFT 17+ Scale 1+ ScaledTanh 1+
Scan 8-24,25+ Scatter 9-10 ScatterElements 11-17,18+ ScatterND 11-17,18+ Selu 6-21,22+ SequenceAt 11+
SequenceConstruct 11+ SequenceEmpty 11+ SequenceErase 11+ SequenceInsert 11+ SequenceLength 11+
Shape 1-24,25+ Shrink 9+ Sigmoid 6-12,13+ Sign 9-12,13+ SimplifiedLayerNormalization 1+ Sin 7-21,22+
Sinh 9-21,22+ Size 1-24,25+ Slice 1-12,13+ Softmax 1-12,13+ Softplus 1-21,22+ Softsign 1-21,22+
SpaceToDepth 1-12,13+ Split 2-17,18+ SplitToSequence 11-23,24+ Sqrt 6-12,13+ Squeeze 1-24,25+
StringConcat 20+ StringNormalizer 10+ StringSplit 20+ Sub 7-13,14+ Sum 6-12,13+ Tan 7-21,22+ Tanh 6-12,13+
TensorScatter 24+ TfIdfVectorizer 9+ ThresholdedRelu 1-21,22+ Tile 6-12,13+ TopK 1-23,24+
Transpose 1-24,25+ Trilu 14+ Unique 11+ Unsqueeze 1-24,25+ Upsample 7-9 Where 9-15,16+ Xor 7+
""",
    "ai.onnx.ml": """
ArrayFeatureExtractor 1+ Binarizer 1+ CastMap 1+ CategoryMapper 1+ DictVectorizer 1+ FeatureVectorizer 1+
Imputer 1+ LabelEncoder 1-3,4+ LinearClassifier 1+ LinearRegressor 1+ Normalizer 1+ OneHotEncoder 1+
SVMClassifier 1+ SVMRegressor 1+ Scaler 1+ TreeEnsemble 5+ TreeEnsembleClassifier 1-2,3+
TreeEnsembleRegressor 1-2,3+ ZipMap 1+
""",
    "com.microsoft": """
Attention 1+ AttnLSTM 1+ BeamSearch 1+ BiasGelu 1+ BifurcationDetector 1+ CDist 1+ CausalConvWithState 1+
ConvTransposeWithDynamicPads 1+ CropAndResize 1+ DecoderMaskedMultiHeadAttention 1+ DequantizeLinear 1+
DynamicQuantizeLSTM 1+ DynamicQuantizeMatMul 1+ DynamicTimeWarping 1+ EmbedLayerNormalization 1+
EngramGate 1+ ExpandDims 1+ FastGelu 1+ FusedConv 1+ FusedGemm 1+ FusedMatMul 1+ GatedAdd 1+
GatedRMSNorm 1+ GatherBlockQuantized 1+ GatherND 1+ Gelu 1+ GreedySearch 1+ GridSample 1+
GroupQueryAttention 1+ Inverse 1+ LinearAttention 1+ LinearAttentionGate 1+ MRotaryEmbedding 1+
MatMulBnb4 1+ MatMulFpQ4 1+ MatMulInteger16 1+ MatMulIntegerToFloat 1+ MatMulNBits 1+ MaxpoolWithMask 1+
MoE 1+ MultiHeadAttention 1+ MurmurHash3 1+ NGramHashMapping 1+ NGramRepeatBlock 1+ NhwcMaxPool 1+ Pad 1+
QAttention 1+ QEmbedLayerNormalization 1+ QGemm 1+ QLinearAdd 1+ QLinearAveragePool 1+ QLinearConcat 1+
QLinearConv 1+ QLinearGlobalAveragePool 1+ QLinearLeakyRelu 1+ QLinearMul 1+ QLinearSigmoid 1+
QLinearSoftmax 1+ QLinearWhere 1+ QMoE 1+ QuantizeLinear 1+ QuickGelu 1+ Range 1+ RotaryEmbedding 1+
SampleOp 1+ Sampling 1+ SkipLayerNormalization 1+ SkipSimplifiedLayerNormalization 1+ SparseAttention 1+
SparseToDenseMatMul 1+ Tokenizer 1+ TransposeMatMul 1+ Trilu 1+ UnfoldTensor 1+ Unique 1+
WhisperBeamSearch 1+ WordConvEmbedding 1+
""",
}
"""The kernels that the CPU provider of this version registers: WebAssembly is a build of it."""

WEBGPU = {
    "": """
Abs 6-12,13+ Acos 7+ Acosh 9+ Add 7-13,14+ ArgMax 1-12,13+ ArgMin 1-12,13+ Asin 7+ Asinh 9+ Atan 7+
Atanh 9+ AveragePool 7-18,19+ BatchNormalization 7-14,15+ Cast 6-20,21+ Ceil 6-12,13+ Clip 6-12,13+
Concat 1-12,13+ Conv 1-10,11+ ConvTranspose 1-10,11+ Cos 7+ Cosh 9+ CumSum 11-13,14+ DFT 17-19,20+
DepthToSpace 11-12,13+ DequantizeLinear 10-20,21+ Div 7-13,14+ Einsum 12+ Elu 6+ Equal 7-18,19+
Erf 9-12,13+ Exp 6-12,13+ Expand 8-12,13+ Flatten 1-20,21+ Floor 6-12,13+ Gather 1-12,13+
GatherElements 11-12,13+ GatherND 11-12,13+ Gelu 20+ Gemm 7-12,13+ GlobalAveragePool 1+ GlobalMaxPool 1+
Greater 7-12,13+ GreaterOrEqual 12-15,16+ GridSample 16-19 HardSigmoid 6+ HardSwish 14+ If 1-20,21+
InstanceNormalization 6+ LayerNormalization 1-16,17+ LeakyRelu 6-15,16+ Less 7-12,13+
LessOrEqual 12-15,16+ Log 6-12,13+ MatMul 1-12,13+ MaxPool 1-11,12+ Mul 7-13,14+ Neg 6-12,13+ Not 1+
Pad 2-20,21+ Pow 7-14,15+ Range 11+ Reciprocal 6-12,13+ ReduceL1 1-17,18+ ReduceL2 1-17,18+
ReduceLogSum 1-17,18+ ReduceLogSumExp 1-17,18+ ReduceMax 1-19,20+ ReduceMean 1-17,18+ ReduceMin 1-19,20+
ReduceProd 1-17,18+ ReduceSum 1-12,13+ ReduceSumSquare 1-17,18+ Relu 6-13,14+ Reshape 5-20,21+
Resize 10-18,19+ ScatterND 11-17,18+ Shape 1-20,21+ Sigmoid 6-12,13+ SimplifiedLayerNormalization 1+
Sin 7+ Sinh 9+ Slice 1-12,13+ Softmax 1-12,13+ Split 1-17,18+ Sqrt 6-12,13+ Squeeze 1-20,21+ Sub 7-13,14+
Tan 7+ Tanh 6-12,13+ ThresholdedRelu 10+ Tile 6-12,13+ Transpose 1-20,21+ Unsqueeze 1-20,21+
Where 9-15,16+
""",
    "com.microsoft": """
Attention 1+ BiasAdd 1+ BiasSplitGelu 1+ FastGelu 1+ FusedConv 1+ GatherBlockQuantized 1+ Gelu 1+
GroupQueryAttention 1+ MatMulNBits 1+ MultiHeadAttention 1+ QuickGelu 1+ RotaryEmbedding 1+
SkipLayerNormalization 1+ SkipSimplifiedLayerNormalization 1+
""",
}
"""The documented table of the WebGPU provider in JavaScript (JSEP): ``docs/webgpu-operators.md`` of the
package. The one in C++ that ``onnxruntime-web/webgpu`` loads has no such table, and has more."""
