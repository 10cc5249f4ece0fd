"""The words of a report, in English and in Chinese."""

import locale
from collections.abc import Mapping
from typing import Any, Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")


class Say:
    """Says a sentence in a language: `say("{num} steps", num=5)`. English is the key."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self._words: Mapping[str, str] = _CHINESE if language == "zh" else {}

    def __call__(self, text: str, **values: Any) -> str:
        return self._words.get(text, text).format(**values)

    def term(self, name: str, kind: str = "") -> str:
        """Translates what a plan or a record calls something; what has no translation stays as it is.

        `kind` tells apart what has one word in English and several in Chinese.
        """
        return self._words.get(f"{kind} {name}", self._words.get(name, name))


def system_language() -> Language:
    """Chinese where the system is, else English."""
    try:
        name = locale.getlocale()[0] or ""
    except ValueError:  # a locale that this system has not
        name = ""
    return "zh" if name.lower().startswith(("zh", "chinese")) else "en"


_CHINESE = {
    # Curves
    "Loss": "损失",
    "Loss and held-out loss over steps": "训练损失与验证损失随步数的变化",
    "training loss": "训练损失",
    "training loss, mean of {size} steps": "训练损失，每 {size} 步的平均",
    "lowest to highest of {size} steps": "每 {size} 步的最低到最高",
    "held-out loss ± standard error": "验证损失 ± 标准误",
    "lowest held-out loss": "验证损失最低处",
    "not finite, update refused": "非有限值，该步更新被跳过",
    "The highest values, up to {highest}, lie above the picture.": "最高值（达 {highest}）超出图外。",
    "Learning rate": "学习率",
    "Gradient norm": "梯度范数",
    "Tokens per second": "每秒 token 数",
    "{title} over steps": "{title}随步数的变化",
    "Clipped at {limit}: {share} of the steps.": "阈值 {limit}，{share} 的步被裁剪。",
    "a part of the items ± standard error": "部分题目的得分 ± 标准误",
    "highest": "最高",
    # Time and memory
    "training": "训练",
    "waiting for data": "等待数据",
    "first step: compiling, warming up": "第一步：编译与预热",
    "evaluating": "评估",
    "samples": "生成样例",
    "saving": "保存",
    "resting (max_power_share)": "休息（max_power_share）",
    "It rested so as to compute at most {share} of the time (max_power_share).": (
        "每步之后休息，计算最多占 {share} 的时间（max_power_share）。"
    ),
    "other": "其他",
    "scoring checkpoints": "给检查点评分",
    "A step took {took} (median); planned were {planned} ({low} to {high}), limited by {limit}.": (
        "每步用时 {took}（中位数）；计划为 {planned}（{low} 至 {high}），受限于{limit}。"
    ),
    "On average {share} of what a large matrix product reaches here.": "平均达到本机大矩阵乘法速度的 {share}。",
    "Planned: {peak} at the fullest moment ({band}).": "计划峰值：{peak}（{band}）。",
    "Measured: {peak}, {off} beside the plan.": "实测：{peak}，与计划相差 {off}。",
    "Not measured: the run is not finished, or was too short.": "未实测：运行尚未结束，或步数太少。",
    "Free for training: {limit}.": "可用于训练：{limit}。",
    "arithmetic": "算力",
    "bandwidth": "显存带宽",
    "launches": "内核启动",
    "data": "数据",
    "communication": "卡间通信",
    "gathered": "临时汇集的层",
    "weights": "权重",
    "gradients": "梯度",
    "optimizer": "优化器状态",
    "activations": "激活值",
    "loss": "损失计算",
    "workspaces": "工作区",
    "batch": "批数据",
    "backward": "反向传播",
    "allocator slack": "分配器余量",
    "CUDA context": "CUDA 上下文",
    "process": "进程本身",
    "checkpoint being written": "正在写入的检查点",
    "malloc": "malloc 开销",
    # Head
    "completed": "已完成",
    "early stopping": "早停",
    "interrupted": "已中断",
    "diverged": "已发散",
    "time limit": "到达时限",
    "in training": "训练中或中途停止",
    "not begun": "尚未开始",
    "Report of the run {name}": "运行报告：{name}",
    "{kind}, {parameters} parameters, trained from scratch on {tokens} tokens of text.": (
        "{kind}，{parameters} 参数，在 {tokens} token 的文本上从头训练。"
    ),
    "{base} ({parameters} parameters), trained further on {tokens} tokens of text.": (
        "{base}（{parameters} 参数），在 {tokens} token 的文本上继续训练。"
    ),
    "{base} ({parameters} parameters), fine-tuned on {rows} chats.": (
        "{base}（{parameters} 参数），在 {rows} 段对话上微调。"
    ),
    "{kind}, {parameters} parameters, trained from scratch on {rows} chats.": (
        "{kind}，{parameters} 参数，在 {rows} 段对话上从头训练。"
    ),
    "Only adapters of rank {r} were trained ({method}).": "只训练了秩为 {r} 的适配器（{method}）。",
    "steps": "步数",
    "tokens seen": "已训练 token",
    "time": "用时",
    "tokens/s": "token/秒",
    "best held-out loss": "最佳验证损失",
    "last training loss": "最近训练损失",
    "most memory": "内存或显存峰值",
    "of {num}": "共 {num}",
    "step {step}": "第 {step} 步",
    "{value} bits per byte": "每字节 {value} 比特",
    "{value} epochs": "{value} 轮",
    "of {limit}": "上限 {limit}",
    "mean of {num} steps": "{num} 步平均",
    "median of steps": "各步中位数",
    "planned {time}": "计划 {time}",
    "Lines of the record that cannot be read and are left out: {num}.": "运行记录中有 {num} 行无法读取，已略去。",
    "Updates refused because loss or gradient was not finite: {num}.": "{num} 步因损失或梯度非有限而跳过更新。",
    # Troubles
    "out of memory": "内存或显存不足",
    "not finite": "非有限值",
    "during steps": "训练步",
    "during step": "训练步",
    "evaluation": "评估",
    "update": "更新",
    "{problem} ({during}), {when}: {remedy}": "{problem}（{during}），{when}：{remedy}",
    "Went wrong without ending the run:": "出过错但训练没有因此结束：",
    # Sections
    "Findings": "诊断",
    "Nothing was found that is wrong.": "未发现问题。",
    "evidence": "证据",
    "likely cause": "可能原因",
    "remedy": "解决办法",
    "stopped the run": "因此停止",
    "at step {step}": "第 {step} 步",
    "{num} times, from step {first} to {last}": "{num} 次，第 {first} 至 {last} 步",
    "Curves": "曲线",
    "Where the time went": "时间去向",
    "Ranks": "各 rank",
    "rank": "rank",
    "own work, of a step": "每步自身计算",
    "waiting for others": "等待其他 rank",
    "Rank {rank} was the slowest; the others waited up to {share} of a step for it.": (
        "rank {rank} 最慢；其他 rank 每步最多有 {share} 的时间在等它。"
    ),
    "Memory, planned and measured": "内存或显存：计划与实测",
    "part": "部分",
    "size": "大小",
    "share": "占比",
    "The line marks what was measured.": "竖线为实测值。",
    "Scores": "得分",
    "score": "得分项",
    "value ± standard error": "值 ± 标准误",
    "items": "题数",
    "checkpoint": "检查点",
    "{num} checkpoints scored": "共评分 {num} 个检查点",
    "Chosen by {task}: {checkpoint} of {num} ({metric} {value} ± {error}, {n} items).": (
        "按 {task} 选定：{num} 个中的 {checkpoint}（{metric} {value} ± {error}，{n} 题）。"
    ),
    "Not to be told from it: {names}.": "与其无显著差异：{names}。",
    "Evaluations": "历次评估",
    "step": "步",
    "held-out loss": "验证损失",
    "bits per byte": "每字节比特",
    "All {num} evaluations": "全部 {num} 次评估",
    "Samples over time": "样例的变化",
    "Prompt": "提示",
    "{num} of {all} moments are shown.": "展示 {all} 次中的 {num} 次。",
    "{num} of {all} prompts are shown.": "展示 {all} 个提示中的 {num} 个。",
    "(nothing)": "（空）",
    "Settings": "设置",
    "setting": "设置项",
    "value": "值",
    "why": "理由",
    "All settings": "全部设置",
    "Choices and their reasons": "自动选择及其理由",
    "model": "模型",
    "duration": "时长",
    "machine": "机器",
    "watching": "监控",
    "settings batch": "批次",
    "settings optimizer": "优化器",
    "versions": "版本",
    "Data": "数据",
    "source": "来源",
    "tokens": "token",
    "Training text": "训练文本",
    "Held-out text": "验证文本",
    "{tokens} tokens, {size}": "{tokens} token，{size}",
    "{tokens} tokens": "{tokens} token",
    "Hash of the prepared data": "预处理后数据的哈希",
    "Hash of the base's weights": "基座权重的哈希",
    "Versions and machine": "版本与机器",
    "They were not recorded.": "未记录。",
    "How to reproduce it": "如何复现",
    "Save the recipe below as recipe.yaml. Paths are shortened to their last part.": (
        "将下面的配方存为 recipe.yaml。路径只保留最后一段。"
    ),
    "The seed is {seed}. On a CPU, and with deterministic: true on a GPU, the same machine gives the same weights bit "
    "for bit; elsewhere losses agree within rounding.": (
        "随机种子为 {seed}。在 CPU 上，或在 GPU 上设 deterministic: true 时，同一机器得到逐位相同的权重；"
        "其他情况下损失在舍入误差内一致。"
    ),
    "Written by onecard on {date}.": "由 onecard 生成于 {date}。",
}
