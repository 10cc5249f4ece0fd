"""The reasons of a plan in Chinese."""

from functools import cache

from onecard.observe.detectors import Phrasebook
from onecard.report.words import Say


def tell_reason(reason: str, say: Say) -> str:
    """Says why a plan decides something; what has no translation, such as a path or an error, stays as it is."""
    return _chinese().translate(reason) if say.language == "zh" else reason


@cache
def _chinese() -> Phrasebook:
    return Phrasebook(_REASONS)


# As the planner writes them; tests make plans of many kinds and look for what is missing here.
_REASONS = {
    "asked for": "配方指定",
    # Several cards
    "{num} processes share a step of {total} samples": "{num} 个进程分担每步的 {total} 条样本",
    "{size} sequences at once, not {asked}: {num} processes share a step of {total} samples": (
        "每次 {size} 条序列，而不是 {asked} 条：{num} 个进程分担每步的 {total} 条样本"
    ),
    "each card holds the whole state, so least crosses": "每张卡都放得下全部状态，这样卡间传输最少",
    "each card holds a part: the whole state and a step need {needed}": (
        "每张卡只存一部分：全部状态加上一步的计算需要 {needed}"
    ),
    # Device and arithmetic
    "{name} is there": "有 {name}",
    "{name} is there, but {problem}": "有 {name}，但是{problem}",
    "no NVIDIA GPU found": "没有找到 NVIDIA GPU",
    "a plan for {name}": "为 {name} 所做的计划",
    "this PyTorch was built without CUDA: install it from the {index} index, see {place}": (
        "这个 PyTorch 不带 CUDA：请从 {index} 源安装，见 {place}"
    ),
    "PyPI's PyTorch for Windows has no CUDA: install it from the {index} index, see {place}": (
        "PyPI 上的 Windows 版 PyTorch 不带 CUDA：请从 {index} 源安装，见 {place}"
    ),
    "PyTorch cannot use it: the driver may be too old for this PyTorch": "PyTorch 不能使用它：驱动可能太旧",
    "this PyTorch ({version}) has no code for its compute capability {number}: install the {build} build, {flag}": (
        "这个 PyTorch（{version}）没有计算能力 {number} 的代码：请安装 {build} 版本，{flag}"
    ),
    "no build of PyTorch from {place} has code for {name}: training on it needs one of your own": (
        "{place} 上没有支持 {name} 的 PyTorch：在它上面训练需要自行编译"
    ),
    "PyTorch's {build} build has no code for {name}: install the {other} build, {flag}": (
        "PyTorch 的 {build} 版本没有 {name} 的代码：请安装 {other} 版本，{flag}"
    ),
    "this CPU multiplies bf16 matrices in hardware": "这个 CPU 有 bf16 矩阵乘法硬件",
    "this CPU has no bf16 matrix instructions": "这个 CPU 没有 bf16 矩阵指令",
    "the card computes bf16": "显卡支持 bf16",
    "the card has no bf16, so fp16 with loss scaling": "显卡不支持 bf16，因此用带损失缩放的 fp16",
    "runs everywhere": "处处可用",
    "{name} counts positions in code of its own, so documents cannot share a row: chats get a row each and documents "
    "of text run one at a time, by its own attention, which holds all scores": (
        "{name} 自行计算位置，因此文档不能共用一行：每段对话各占一行，文本文档逐个运行，用它自己的注意力，保留全部分数"
    ),
    "{name} hands a state from token to token, so documents cannot share a row: chats get a row each and documents of "
    "text run one at a time, by its own code": (
        "{name} 逐 token 传递状态，因此文档不能共用一行：每段对话各占一行，文本文档逐个运行，用它自己的代码"
    ),
    "layers of {name} take borders of documents by a mask alone: its own attention, which holds all scores": (
        "{name} 的层只能用掩码表示文档边界：用它自己的注意力，保留全部分数"
    ),
    "{name} asks for more than PyTorch's kernels compute (a softcap or sinks): its own, with all scores": (
        "{name} 需要 PyTorch 内核没有的运算（softcap 或 sinks）：用它自己的，保留全部分数"
    ),
    "{name} computes attention in code of its own, which holds all scores; a mask keeps documents apart": (
        "{name} 用自己的代码计算注意力，保留全部分数；用掩码隔开文档"
    ),
    # Compiling
    "documents of any length run one at a time, each a shape to compile": "长度不一的文档逐个运行，每种形状都要编译",
    "its own code counts positions or goes from token to token in Python, which compiles for long": (
        "它自己的代码计算位置或用 Python 逐 token 运行，编译很久"
    ),
    "the run is over before compiling pays": "训练太短，编译不划算",
    "pays back within the run": "在训练过程中能收回编译的时间",
    "no C++ compiler is installed": "没有安装 C++ 编译器",
    "Triton is not installed or does not support this card": "没有安装 Triton，或它不支持这块显卡",
    "PyTorch for Windows comes without Triton": "Windows 版 PyTorch 不带 Triton",
    "Triton needs compute capability 7.0 or newer, and {name} has {number}": (
        "Triton 需要计算能力 7.0 或更新，{name} 为 {number}"
    ),
    "the compiler failed in the run": "训练中编译失败",
    # Batch
    "about {num} chats per step": "每步约 {num} 段对话",
    "about {num} tokens per step": "每步约 {num} token",
    "at most {num} tokens at once": "一次最多 {num} token",
    "{total} sequences in {num} micro-batches": "{total} 个序列分成 {num} 个 micro-batch",
    "the fastest here of those tried, in seconds of passes a step: {told}": (
        "在本机试过的里面最快，每步各次前后向的秒数：{told}"
    ),
    "smaller ones were slower here, in seconds of passes a step: {told}": (
        "更小的在本机更慢，每步各次前后向的秒数：{told}"
    ),
    "the smallest, for nothing else may fit": "最小的，其他的都可能放不下",
    "the fastest that fits: {peak} of {limit}": "放得下的里面最快：{limit} 中占 {peak}",
    "the fastest that fits: {peak} of {limit}, before compiling": "放得下的里面最快：{limit} 中占 {peak}（编译前）",
    "{value} fits before compiling, but not compiled": "{value} 在编译前放得下，编译后放不下",
    "the fewest layers that have to recompute so that it fits": "为放得下而必须重算的最少层数",
    "faster, for the larger micro-batch it allows": "更快，因为可以用更大的 micro-batch",
    "does not fit without": "不用就放不下",
    "fits without, so nothing is computed twice": "不用也放得下，所以不重复计算",
    "all logits at once do not fit": "一次算出全部 logits 放不下",
    "tokens whose logits exist at once: {logits} keep the device busy": (
        "同时存在 logits 的 token 数：{logits} 足以让设备忙碌"
    ),
    "memory ran out in the run with more": "训练中更大时内存不足",
    # Duration
    "{epochs} x {num} chats": "{epochs} × {num} 段对话",
    "{epochs} x {num} tokens": "{epochs} × {num} token",
    "{num} tokens": "{num} token",
    "{num} steps": "{num} 步",
    "those of an epoch": "一轮的步数",
    "warmup_steps; warmup_ratio beside it counts for nothing": "以 warmup_steps 为准，warmup_ratio 不起作用",
    "{allowed} at {step} s per step, measured": "{allowed}，实测每步 {step} 秒",
    "{allowed} at {step} s per step, measured, with its rests": "{allowed}，实测每步 {step} 秒，含休息",
    "{allowed} at {step} s per step, measured, are over before {asked} ({num} steps)": (
        "实测每步 {step} 秒，{allowed} 早于 {asked}（{num} 步）结束"
    ),
    "{allowed} at {step} s per step, measured, with its rests, are over before {asked} ({num} steps)": (
        "实测每步 {step} 秒（含休息），{allowed} 早于 {asked}（{num} 步）结束"
    ),
    "{asked}, over before {allowed} at {step} s per step, measured": "{asked}，实测每步 {step} 秒，早于 {allowed} 结束",
    "{asked}, over before {allowed} at {step} s per step, measured, with its rests": (
        "{asked}，实测每步 {step} 秒（含休息），早于 {allowed} 结束"
    ),
    # Model and tasks
    "{num} tokens, padded to {padded} for speed": "{num} 个 token，为速度补齐到 {padded}",
    "all positions that {name} has; the default of {length} is more": "{name} 的全部位置；默认的 {length} 更多",
    "{num} tokens of {name} and {new} new ones": "{name} 的 {num} 个 token，加 {new} 个新的",
    "none while fine-tuning, though the model's config says {value}; dropout sets it": (
        "微调时不用，虽然模型配置为 {value}；可用 dropout 设置"
    ),
    "found in {folder}": "位于 {folder}",
    "config.json in {folder}; its weights are not here yet": "{folder} 中的 config.json；权重尚未下载",
    "as onecard knows it ({source})": "按 onecard 已知的资料（{source}）",
    "{names}: in the chat template and not trained in {name}, so learned beside the adapters": (
        "{names}：对话模板中有而 {name} 没有训练过，因此与适配器一起学习"
    ),
    "the first of eval_tasks says which checkpoint is best": "由 eval_tasks 的第一项决定哪个检查点最好",
    "reserve_gb is for GPUs: on a CPU it changes nothing": "reserve_gb 用于 GPU，在 CPU 上不起作用",
    "memory_limit_gb is for GPUs: on a CPU it changes nothing": "memory_limit_gb 用于 GPU，在 CPU 上不起作用",
    "memory_limit_gb {num} changes nothing: it is more than can be had": (
        "memory_limit_gb {num} 不起作用：超过可用的显存"
    ),
    "the step cannot be traced ({error}): its first seconds will tell": "无法预先推算这一步（{error}）：开始后几秒即知",
    "the step cannot be traced ({error}), so memory and time are not known": (
        "无法预先推算这一步（{error}），因此内存和时间未知"
    ),
}
