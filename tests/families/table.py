"""What octavo does with each experts class of transformers. A class that is missing here fails ``test_table.py`` by
its name.

``NEWEST`` is the version that the table was written for. Older ones lack some of its classes, which are then skipped.
"""

from importlib.metadata import version

NEWEST = "5.23.0"
INSTALLED = version("transformers")

_NO_NORM = "it normalises each expert's output before the combine"
_TRANSPOSED = "its stacks are transposed ([E, in, out]), and no FP8 format says how their scales lie"

# FP8 and plain weights alike run on octavo's forward.
FLOAT8: tuple[str, ...] = (
    "AXK1Experts",
    "AXK2Experts",
    "AfmoeExperts",
    "BailingHybridExperts",
    "BeamExperts",
    "Cohere2MoeExperts",
    "DeepseekOcr2TextExperts",
    "DeepseekV2Experts",
    "DeepseekV32Experts",
    "DeepseekV3Experts",
    "DeepseekV4Experts",
    "DiffusionGemmaTextExperts",
    "Dots1Experts",
    "Dots3NoteExperts",
    "Ernie4_5_MoeExperts",
    "Ernie4_5_VLMoeMoeExperts",
    "ExaoneMoeExperts",
    "FlexOlmoExperts",
    "FlintExperts",
    "Gemma4TextExperts",
    "Glm4MoeExperts",
    "Glm4MoeLiteExperts",
    "Glm4vMoeTextExperts",
    "Glm5NextTextExperts",
    "GlmMoeDsaExperts",
    "GraniteMoeExperts",
    "GraniteMoeHybridExperts",
    "GraniteMoeSWAExperts",
    "GraniteMoeSharedExperts",
    "HYV3Experts",
    "HYV4Experts",
    "HunYuanMoEV1Experts",
    "Inkling2Experts",
    "InklingExperts",
    "JambaExperts",
    "KimiLinearExperts",
    "Kolibri1Experts",
    "LagunaExperts",
    "Lfm2MoeExperts",
    "MellumExperts",
    "MiMoV2FlashExperts",
    "MiniMaxExperts",
    "MiniMaxM2Experts",
    "MiniMaxM3VLExperts",
    "Mistral4Experts",
    "MistralLarge4TextExperts",
    "MixtralExperts",
    "NemotronHExperts",
    "OlmoeExperts",
    "PhimoeExperts",
    "Qwen2MoeExperts",
    "Qwen3MoeExperts",
    "Qwen3NextExperts",
    "Qwen3OmniMoeTalkerTextExperts",
    "Qwen3OmniMoeThinkerTextExperts",
    "Qwen3VLMoeTextExperts",
    "Qwen3_5MoeExperts",
    "Qwen4ExpTextExperts",
    "SolarOpenExperts",
    "UnlimitedOcrTextExperts",
    "ZayaExperts",
)

# Of these, transformers' checkpoints keep a layer's experts in one tensor, for which no FP8 format that octavo reads
# has scales.
STACKED_ON_DISK: tuple[str, ...] = (
    "DiffusionGemmaTextExperts",
    "Gemma4TextExperts",
    "GraniteMoeExperts",
    "GraniteMoeHybridExperts",
    "GraniteMoeSWAExperts",
    "GraniteMoeSharedExperts",
    "HYV4Experts",
    "Inkling2Experts",
    "InklingExperts",
    "MiniMaxM3VLExperts",
    "Mistral4Experts",
    "Qwen3VLMoeTextExperts",
    "ZayaExperts",
)

# Of these, transformers distributes the experts of a checkpoint's layer over two modules.
SPLIT_WHILE_LOADING: tuple[str, ...] = ("Ernie4_5_VLMoeMoeExperts",)

# Plain weights run on octavo's forward; FP8 ones are refused, for this reason.
PLAIN_ONLY: dict[str, str] = {
    "AriaExperts": _TRANSPOSED,
    "GptOssExperts": _TRANSPOSED,
    "OpenAIPrivacyFilterExperts": _TRANSPOSED,
}

# Neither: plain weights stay on the class's own forward, for this reason.
NOT_OURS: dict[str, str] = {"MuseSparkExperts": _NO_NORM}

# Stacks by the usual names in a class without the decorator: octavo does not know its layout and leaves it alone.
UNDECORATED: tuple[str, ...] = ("InklingSharedExperts", "Llama4TextExperts", "LongcatFlashExperts", "Step3p7Experts")

PLAIN: tuple[str, ...] = (*FLOAT8, *PLAIN_ONLY)
ALL: tuple[str, ...] = (*PLAIN, *NOT_OURS)

# Their gates, or all of their own forward, compute in float32 whatever comes in.
FLOAT32_INSIDE = ("BeamExperts", "Inkling2Experts", "OpenAIPrivacyFilterExperts")

# AutoModelForCausalLM builds no model around these, so ``load_model`` does not either; their own classes load inside
# ``octavo.enabled()``.
NO_CAUSAL_LM = (
    "DeepseekOcr2TextExperts",
    "DiffusionGemmaTextExperts",
    "Ernie4_5_VLMoeMoeExperts",
    "Glm4vMoeTextExperts",
    "Glm5NextTextExperts",
    "Mistral4Experts",
    "MistralLarge4TextExperts",
    "MuseSparkExperts",
    "OpenAIPrivacyFilterExperts",
    "Qwen3OmniMoeTalkerTextExperts",
    "Qwen3OmniMoeThinkerTextExperts",
    "Qwen3VLMoeTextExperts",
    "UnlimitedOcrTextExperts",
)
CAUSAL_LM = tuple(name for name in ALL if name not in NO_CAUSAL_LM)

# Linear layers that a checkpoint may hold in FP8 and that octavo dequantizes while loading, because the model's own
# code reads their weight, or wants it in float32. By the last part of their names.
DEQUANTIZED: dict[str, tuple[str, ...]] = {
    "AXK2Experts": ("weights_proj",),
    "DeepseekV32Experts": ("weights_proj",),
    "DeepseekV4Experts": ("compressor.wkv", "compressor.wgate", "weights_proj"),
    "Dots3NoteExperts": ("weights_proj",),
    "GlmMoeDsaExperts": ("weights_proj",),
    "GraniteMoeHybridExperts": ("mamba.out_proj",),
    "HYV4Experts": ("weights_proj",),
    "JambaExperts": ("mamba.dt_proj",),
    "NemotronHExperts": ("mixer.out_proj",),
}
