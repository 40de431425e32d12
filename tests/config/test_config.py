"""A config's mistakes, each with its place; overrides; writing TOML; and frozen keys."""

import re
import tomllib
from collections.abc import Iterable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fastpref.config import Config, load_config
from fastpref.config.formats import NAMES, options_of
from fastpref.config.losses import DPO, LossOptions, Variant
from fastpref.config.optimization import ScheduleName
from fastpref.config.toml import to_toml
from fastpref.errors import UserError
from tests.support.lists import of_lists

BASE = '[model]\nname = "m"\n[[data]]\npath = "d"\n'  # four lines, so that an addition begins at line 5
SMALLEST = {"model": {"name": "m"}, "data": [{"path": "d"}]}


def load(folder: Path, text: str, overrides: Iterable[str] = ()) -> Config:
    path = folder / "cfg.toml"
    path.write_bytes(text.encode())
    return load_config(path, overrides)


def mistakes(folder: Path, text: str, overrides: Iterable[str] = ()) -> list[str]:
    """Return the lines of the message about a config, without the folder."""
    with pytest.raises(UserError) as caught:
        load(folder, text, overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


# --- Mistakes in a file --------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[str, ...]] = {  # a file, and `LINE: key` of each mistake
    "a table": (BASE + "\n# words\n[train]\nbatch = 0\n", "8: train.batch"),
    "a table before the others": ("[train]\nbatch = 0\n" + BASE, "2: train.batch"),
    "a missing key stands at its table": ('\n[model]\n\n[[data]]\npath = "d"\n', "2: model.name"),
    "the second [[data]]": (BASE + '[[data]]\npath = "e"\nrows = 0\n', "7: data[1].rows"),
    "a key missing from the third [[data]]": (BASE + '[[data]]\npath = "e"\n\n[[data]]\n', "8: data[2].path"),
    "[[eval.data]] after [eval]": (
        BASE + '[eval]\nevery = 0\n[[eval.data]]\npath = "e"\n[[eval.data]]\npath = 1\n',
        "6: eval.every", "10: eval.data[1].path",
    ),
    "[[eval.data]] before [eval]": (
        BASE + '[[eval.data]]\npath = "e"\nrows = -1\n[eval]\nevery = 0\n', "7: eval.data[0].rows", "9: eval.every",
    ),
    "a table inside an entry": (
        BASE + "[data.more]\nx = 1\n[[data]]\npath = 1\n[data.more]\n",
        "5: data[0].more", "8: data[1].path", "9: data[1].more",
    ),
    "[[train]] for [train]": (BASE + "[[train]]\nbatch = 2\n", "5: train"),
    "after an array over several lines": (
        BASE + '[lora]\ntarget = [  # [train]\n  "q_proj",\n  # "]"\n  "v_proj",\n]\nrank = 0\n', "11: lora.rank",
    ),
    "an entry of an array stands where the array begins": (
        BASE + '[lora]\ntarget = [\n  "q_proj",\n  3,\n]\n', "6: lora.target[1]",
    ),
    "after a string over several lines": (
        BASE + '[tokens]\nchat_template = """\n[train]\nbatch = 0\n\\"""\n"""\nmax_length = 0\n',
        "11: tokens.max_length",
    ),
    "after a literal string over several lines": (
        BASE + "[tokens]\nchat_template = '''\n[[data]]\n\"\"\"'''\nmax_length = 0\n", "9: tokens.max_length",
    ),
    "inline tables": (
        'model = { name = "m", dtype = 8 }\n\ndata = [{ path = "d" }]\ntrain = { seed = 1, batch = 0 }\n',
        "1: model.dtype", "4: train.batch",
    ),
    "an array of inline tables stands where it begins": (
        'model.name = "m"\ndata = [\n  { path = "d" },\n  { path = "e", rows = 0 },\n]\n', "2: data[1].rows",
    ),
    "dotted keys": (
        'model.name = "m"\nmodel.dtype = 8\ntrain.batch = 0\ndata = [{ path = "d" }]\nloss.beta = 0\n',
        "2: model.dtype", "3: train.batch", "5: loss.beta",
    ),
    "quoted keys": (BASE + '[ "train" ] # [model]\n\'batch\' = 0\n"seed" = 0.5\n', "6: train.batch", "7: train.seed"),
    "Windows line ends": (BASE.replace("\n", "\r\n") + "[train]\r\nbatch = 0\r\n", "6: train.batch"),
    "a byte order mark": ("\ufeff" + BASE + "[train]\nbatch = 0\n", "6: train.batch"),
    "characters that some take for line ends": (
        '[model]\nname = "a\u2028b\x85c" # \u2029\n[[data]]\npath = "d"\n[train]\nbatch = 0\n', "6: train.batch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES.values(), ids=PLACES)
def test_a_mistake_is_at_its_line(tmp_path: Path, case: tuple[str, ...]):
    """Every message begins with `file:LINE: key: `, however TOML allows the key to be written."""
    text, *places = case
    messages = mistakes(tmp_path, text)
    assert [": ".join(line.split(": ")[:2]) for line in messages] == [f"cfg.toml:{place}" for place in places]


LOSSES = "dpo, ipo, kto, orpo, simpo, cpo, pl, lipo, sft"
COPY_ONLY = 'reference.{}: only a frozen copy has this key; set reference.mode = "copy", or remove it'
MISTAKES: dict[str, str] = {  # what stands before BASE, and the messages
    # Unknown keys
    "train.learning_rte = 1": "1: train.learning_rte: unknown key (did you mean 'learning_rate'?)",
    "train.learning-rate = 1": "1: train.learning-rate: unknown key (did you mean 'learning_rate'?)",
    "train.Batch = 1": "1: train.Batch: unknown key (did you mean 'batch'?)",
    "train.max_length = 9": "1: train.max_length: unknown key (did you mean 'tokens.max_length'?)",
    "train.zzz = 1": "1: train.zzz: unknown key",
    "trian.batch = 1": "1: trian: unknown key (did you mean 'train'?)",
    "beta = 0.1\nbatch = 3\nrank = 8\nnmae = 'm'": "1: beta: unknown key (did you mean 'loss.beta'?)\n"
    "2: batch: unknown key (did you mean 'train.batch'?)\n3: rank: unknown key (did you mean 'lora.rank'?)\n"
    "4: nmae: unknown key",
    # Names of other trainers
    "train.lr = 1\ntrain.per-device-train-batch-size = 1\nlora.r = 8\nbf16 = true\npeft = {}":
    "1: train.lr: unknown key; here it is train.learning_rate\n"
    "2: train.per-device-train-batch-size: unknown key; here it is train.batch, the rows of an optimizer step: "
    "micro-batch × accumulation × devices\n3: lora.r: unknown key; here it is lora.rank\n"
    '4: bf16: unknown key; here it is model.dtype, such as "bfloat16"\n'
    "5: peft: unknown key; here it is [lora], a table, which trains adapters",
    "eval.data = [{ path = 'e', format = 'chatml.intel', chat = true }]":
    '1: eval.data[0].chat: the format chatml.intel writes the text itself; remove this key, or take format = "auto" or '
    "a table",
    "eval.data = [{ path = 'e', format = 'chat_template.default', chat = false }]":
    "1: eval.data[0].chat: the format chat_template.default makes chats; remove this key, or name the columns of text "
    "by a table",
    "eval.data = [{ path = 'e', weights = 1 }]": "1: eval.data[0].weights: unknown key (did you mean 'weight'?)",
    # Types and ranges
    "train.batch = '4'": "1: train.batch: must be a valid integer, got '4'",
    "train.batch = 1.5": "1: train.batch: must be a valid integer, got 1.5",
    "train.batch = {}": "1: train.batch: must be a valid integer, got {}",
    "train.epochs = true": "1: train.epochs: must be a valid number, got True",
    "train.learning_rate = inf": "1: train.learning_rate: must be a finite number, got inf",
    "train.warmup = nan": "1: train.warmup: must be a finite number, got nan",
    "output.save_every = 0": "1: output.save_every: must be a number of steps, a share of all steps below 1, "
    '"auto" or "stop", got 0',
    "[eval]\nfraction = 0.1\nevery = 1.5": "3: eval.every: must be a number of steps, a share of all steps "
    'below 1, "auto" or "end", got 1.5',
    "tokens.chat_template = 3": "1: tokens.chat_template: must be a valid string, got 3",
    "lora.dora = 1": "1: lora.dora: must be a valid boolean, got 1",
    "lora.dropout = 1.0": "1: lora.dropout: must be less than 1, got 1.0",
    "lora.modules_to_save = 'x'": "1: lora.modules_to_save: must be an array, got 'x'",
    "lora.target = ['q', 3]": "1: lora.target[1]: must be a valid string, got 3",
    "lora.target = '(q|v_proj'\nlora.exclude = ['vision', '[a']": "1: lora.target: '(q|v_proj' is not a regular "
    "expression: missing ), unterminated subpattern at position 0\n"
    "2: lora.exclude: '[a' is not a regular expression: unterminated character set at position 0",
    "lora.init = 'loftq'": '1: lora.init: "loftq" makes up for the rounding to 4 bits; set model.quantization = "nf4", '
    "or leave it out",
    "lora = { init = 'orthogonal', rank = 3 }": "1: lora.init: orthogonal needs even ranks, got 3",
    "lora = { init = 'loftq', dora = true }": "1: lora.init: DoRA keeps the norms of the rounded weights, which loftq "
    "changes; set dora = false",
    "lora.init = 'pisa'": "1: lora.init: must be one of default, gaussian, orthogonal, pissa, olora, loftq, "
    "pissa_niter_N, got 'pisa' (did you mean 'pissa'?)",
    "lora.layers = '3'": "1: lora.layers: '3' is neither an index such as 3 nor a slice such as \"8:16\"",
    "lora.layers = [1, 2.5]": "1: lora.layers[1]: must be a valid string, or must be a valid integer, got 2.5",
    "lora.rank_pattern = { q_proj = 0 }": "1: lora.rank_pattern.q_proj: must be greater than or equal to 1, got 0",
    "lora.alpha_pattern = { '(q' = 1 }": "1: lora.alpha_pattern: '(q' is not a regular expression: missing ), "
    "unterminated subpattern at position 0",
    # Words
    "train.layout = 'tre'": "1: train.layout: must be one of auto, tree, packed, padded, got 'tre' (did you mean "
    "'tree'?)",
    "train.layout = ['tree']": "1: train.layout: must be one of auto, tree, packed, padded, got ['tree'] (did you mean "
    "'tree'?)",
    "train.optimizer = 'lyon'": "1: train.optimizer: must be one of adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, "
    "lion, lion_8bit, paged_lion, paged_lion_8bit, adafactor, muon, schedule_free_adamw, got 'lyon' (did you mean "
    "'lion'?)",
    "train.checkpointing = 'yes'": "1: train.checkpointing: must be a valid boolean, or must be one of auto, got 'yes'",
    "lora.target = 'all-linar'": "1: lora.target: must be an array, or must be one of all-linear, got 'all-linar' "
    "(did you mean 'all-linear'?)",
    "reference.mode = 'frozen'": "1: reference.mode: must be one of auto, adapter, copy, precompute, got 'frozen'",
    "log.trackers = ['wandbb']": "1: log.trackers[0]: must be one of aim, clearml, comet_ml, dvclive, mlflow, "
    "swanlab, tensorboard, trackio, wandb, got 'wandbb' (did you mean 'wandb'?)",
    # The loss
    "loss.type = 'kot'": f"1: loss.type: must be one of {LOSSES}, got 'kot' (did you mean 'kto'?)",
    "loss.type = 3": f"1: loss.type: must be one of {LOSSES}, got 3",
    "loss.type = 'kto'\nloss.variants = ['ipo']\nloss.gamma = 1.0\nloss.sft_weight = 1.0":
    "2: loss.variants: this loss has no such key; it belongs to dpo\n"
    "3: loss.gamma: this loss has no such key; it belongs to simpo\n"
    "4: loss.sft_weight: this loss has no such key; it belongs to simpo, cpo",
    "loss.bta = 1.0": "1: loss.bta: unknown key (did you mean 'beta'?)",
    "loss.variants = ['sft', 'hing']":
    f"1: loss.variants[1]: must be one of {', '.join(get_args(Variant))}, got 'hing' (did you mean 'hinge'?)",
    "loss.variants = []": "1: loss.variants: needs at least one entry",
    "loss.label_smoothing = 0.1\nloss.variants = ['ipo']":
    "1: loss.label_smoothing: label_smoothing has no effect on ipo; set it to 0",
    "loss.label_smoothing = 0.1\nloss.variants = ['hinge', 'sft']":
    "1: loss.label_smoothing: only sigmoid, exo_pair, robust, aot, aot_unpaired have it; set it to 0",
    "loss.f_alpha = 0.2": "1: loss.f_alpha: only f_divergence = \"alpha\" has it, not 'reverse_kl'; leave it out",
    "loss.discopop_tau = 1.0": "1: loss.discopop_tau: only the variant discopop has it; leave it out",
    "loss.type = 'ipo'\nloss.label_smoothing = 0.1":
    "2: loss.label_smoothing: this loss has no such key; it belongs to dpo, simpo, cpo",
    "loss.type = 'cpo'\nloss.variant = 'ipo'\nloss.label_smoothing = 0.1":
    "3: loss.label_smoothing: label_smoothing has no effect on variant = 'ipo'; set it to 0",
    "loss.variants = ['exo_pair']": "1: loss.variants: exo_pair needs label_smoothing above 0, such as 1e-3",
    "loss.weights = [1.0, 2.0]": "1: loss.weights: weights has 2 entries, variants has 1",
    "loss.variants = ['sft', 'sft']": "1: loss.variants: variants names a loss twice: sft, sft",
    "loss.variants = ['aot']\nloss.weighting = true":
    "2: loss.weighting: weighting cannot go with aot or aot_unpaired, which compare different pairs",
    "loss.type = 'simpo'\nloss.gamma = 1.0\nloss.gamma_beta_ratio = 0.5":
    "2: loss.gamma: gamma and gamma_beta_ratio both set the target margin; remove one of them",
    # Keys and tables that disagree
    "lora.target = ['lm_head']\nlora.dora = true":
    "2: lora.dora: DoRA cannot adapt the head; remove lm_head from target, or set dora = false",
    "eval.fraction = 0.1\neval.data = [{ path = 'e' }]":
    "1: eval.fraction: fraction and [[eval.data]] both hold out data; remove one of them",
    "train.batch = 1\nloss.type = 'kto'":
    "1: train.batch: KTO compares each row with the next one of its batch, so a batch needs two rows; "
    'set train.batch to 2 or more, or loss.kl = "none"',
    "eval.data = [{ path = 'd' }, { path = 'e', pairs = 'all', min_difference = 1 }]\nloss.type = 'kto'":
    "1: eval.data[1].pairs: kto takes the best completion of a list as a good one and the worst as a bad one; remove "
    "this key, or use a loss of pairs",
    "eval.data = [{ path = 'e', pairs = 'best' }]": "1: eval.data[0].pairs: must be one of best-worst, best-rest, all, "
    "adjacent, got 'best' (did you mean 'best-rest'?)",
    "eval.data = [{ path = 'e', min_difference = -1 }]":
    "1: eval.data[0].min_difference: must be greater than or equal to 0, got -1",
    "reference.mode = 'adapter'\neval.every = 3":
    '1: reference.mode: "adapter" needs a [lora] table; full fine-tuning takes "copy"\n'
    "2: eval.every: there is nothing to evaluate on; set eval.fraction or add [[eval.data]]",
    "loss.type = 'orpo'\nreference.mode = 'copy'\nreference.dtype = 'float32'\nreference.name = 'r'":
    "2: reference.mode: orpo has no reference; remove the key\n3: reference.dtype: orpo has no reference; remove the "
    "key\n4: reference.name: orpo has no reference; remove the key",
    # The optimization
    "train.optimizer = 'lion'\ntrain.epsilon = 1e-6":
    "2: train.epsilon: lion has no such setting; remove the key, or take adamw",
    "train.optimizer = 'muon'\ntrain.betas = [0.9, 0.95]":
    "2: train.betas: muon has no such setting; remove the key, or take adamw",
    "train.betas = [0.9, 1.0]": "1: train.betas[1]: must be less than 1, got 1.0",
    "lora.plus_ratio = 0.5": "1: lora.plus_ratio: must be greater than or equal to 1, got 0.5",
    "train.optimizer = 'schedule_free_adamw'\ntrain.schedule = 'cosine'":
    "2: train.schedule: schedule_free_adamw needs no schedule and takes none, its weights are averages; remove the "
    'key, or take train.optimizer = "adamw"',
    "train.schedule = 'cosine_with_restart'": f"1: train.schedule: must be one of {', '.join(get_args(ScheduleName))}, "
    "got 'cosine_with_restart' (did you mean 'cosine_with_restarts'?)",
    "train.schedule_options = { num_cycle = 2 }": "1: train.schedule_options.num_cycle: the schedule cosine has "
    "no such option (did you mean 'num_cycles'?); it has num_cycles",
    "train.schedule = 'linear'\ntrain.schedule_options = { power = 2 }":
    "2: train.schedule_options.power: the schedule linear has no such option; it has none",
    "train.schedule = 'cosine_with_restarts'\ntrain.schedule_options = { num_cycles = 1.5 }":
    "2: train.schedule_options.num_cycles: must be a whole number, got 1.5",
    "train.schedule = 'warmup_stable_decay'\ntrain.schedule_options = { num_decay_steps = 1.5, decay_type = 'sine' }":
    "2: train.schedule_options.num_decay_steps: must be a number of steps, or a share of all below 1, got 1.5\n"
    "2: train.schedule_options.decay_type: must be one of linear, cosine, 1-sqrt, got 'sine'",
    "train.schedule = 'warmup_stable_decay'":
    "1: train.schedule: warmup_stable_decay needs train.schedule_options = { num_decay_steps = 0.2 }, the steps in "
    "which the rate falls at the end; below 1 it is a share of all steps",
    "train.schedule = 'inverse_sqrt'\ntrain.min_lr = 1e-8":
    "2: train.min_lr: the schedule inverse_sqrt does not end at a lowest rate; remove the key, or take cosine, linear, "
    "polynomial, cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay, reduce_lr_on_plateau, greedy",
    "train.min_lr = 1e-3": "1: train.min_lr: must be less than the learning rate, 1e-06, got 0.001",
    "train.schedule = 'cosine_with_min_lr'":
    "1: train.schedule: cosine_with_min_lr needs train.min_lr, the lowest learning rate",
    "train.schedule = 'polynomial'\ntrain.min_lr = 1e-8\ntrain.schedule_options = { lr_end = 1e-8 }":
    "2: train.min_lr: train.schedule_options.lr_end says it already; remove one of them",
    "train.schedule = 'polynomial'\ntrain.learning_rate = 1e-7":
    "1: train.schedule: polynomial ends at 1e-07, which is not less than the learning rate, 1e-07; set train.min_lr",
    "train.schedule = 'polynomial'\ntrain.schedule_options = { lr_end = 'low' }":
    "2: train.schedule_options.lr_end: must be a number, got 'low'",
    "train.schedule = 'greedy'": "1: train.schedule: greedy follows the held-out loss; hold out data, and set "
    "eval.every",
    "train.schedule = 'reduce_lr_on_plateau'\neval.fraction = 0.1\neval.every = 5\ntrain.warmup = 3":
    "4: train.warmup: the schedule reduce_lr_on_plateau has no warm-up; remove the key",
    "train.stop = { after = 0 }\neval.fraction = 0.1\neval.every = 5":
    "1: train.stop.after: must be greater than or equal to 1, got 0",
    "train.stop = { metric = 'eval/loss' }": "1: train.stop: evaluations say when to stop; hold out data, and leave "
    "eval.every out or set it",
    "train.stop = { metric = 'rewards/acuracies' }\neval.fraction = 0.1\neval.every = 5\nloss.type = 'orpo'":
    "1: train.stop.metric: orpo has no metric 'rewards/acuracies' of which more or less is better (did you mean "
    "'eval/rewards/accuracies'?); it has eval/loss, eval/rewards/accuracies, eval/rewards/margins, "
    "eval/rewards/chosen, eval/rewards/rejected, eval/logps/chosen, eval/logps/rejected, eval/mean_token_accuracy, "
    "eval/logps/accuracies, eval/nll_loss, eval/log_odds_chosen, eval/log_odds_ratio",
    "train.callbacks = ['mine.f']": "1: train.callbacks: 'mine.f' is not of the form \"module:function\"",
    "train.callbacks = 'mine:f'": "1: train.callbacks: must be an array, got 'mine:f'",
    "reference.dtype = 'bfloat16'\nreference.quantization = 'nf4'":
    f"1: {COPY_ONLY.format('dtype')}\n2: {COPY_ONLY.format('quantization')}",
}  # fmt: skip


@pytest.mark.parametrize(("added", "messages"), MISTAKES.items(), ids=MISTAKES)
def test_messages_of_mistakes(tmp_path: Path, added: str, messages: str):
    """Each mistake is one line, `file:LINE: key: what (did you mean 'x'?)`; all come at once and in file order."""
    assert mistakes(tmp_path, f"{added}\n{BASE}") == [f"cfg.toml:{line}" for line in messages.splitlines()]


OF_DATA: dict[str, str] = {  # a line at the end of BASE, in [[data]], and what follows `cfg.toml:5: data[0].`
    "weight = 0": "weight: must be greater than 0, got 0",
    "format = 'chatml.intl'": "format: there is no format 'chatml.intl' (did you mean 'chatml.intel' or 'chatml.icr' "
    f"or 'chatml.argilla'?); known are {', '.join(NAMES)}, a table of your columns "
    '({ field_prompt = "question", ... }), and "module:function"',
    "format = 3": "format: must be a name or a table, got 3",
    "format.field_promt = 'q'": "format.field_promt: the format table has no such option (did you mean "
    f"'field_prompt'?); it has {', '.join(options_of('table'))}",
    "format = { type = 'chatml.icr', roles = {} }": "format.roles: the format chatml.icr has no options",
    "format = { type = 'mine:read', x = 1 }": "format.x: a function of your own takes no options",
    "format.type = 3": "format.type: must be a format's name, got 3",
    "format = { type = 'chat_template.default', roles = { assistant = 'bot' } }": "format.roles: must be a table of "
    "lists, a role for the template = the roles in the data, got {'assistant': 'bot'}",
    "format.prompt_format = '{promt}'": "format.prompt_format: {promt} is not known here, {prompt} and {system} can "
    "be; write {{ for a brace",
    "format.chosen_format = 'x'": "format.chosen_format: {chosen} must be in it",
    "format.completion_format = '{completion'": "format.completion_format: expected '}' before end of string; a brace "
    "that is meant as one is written twice",
}


@pytest.mark.parametrize(("line", "message"), OF_DATA.items(), ids=OF_DATA)
def test_messages_of_mistakes_in_data(tmp_path: Path, line: str, message: str):
    """Formats and their options are checked with the config, before any data are read."""
    assert mistakes(tmp_path, BASE + line) == [f"cfg.toml:5: data[0].{message}"]


WHOLE: dict[str, str] = {  # a file, and what follows its name in the messages
    "": ": model: is missing\n: data: is missing, add a table [[data]] with a path",
    "model.name = 'm'": ": data: is missing, add a table [[data]] with a path",
    "data = []\nmodel.name = 'm'": ":1: data: needs at least one entry",
    "model.name = 'm'\n[data]\npath = 'd'": ":2: data: must be an array of tables; write [[data]]",
    "model.name = 'm'\n[[data]]\npth = 'd'": ":2: data[0].path: is missing\n"
    ":3: data[0].pth: unknown key (did you mean 'path'?)",
    "model = 'm'\nloss = 'dpo'\ndata = 'd'": ":1: model: must be a table, got 'm'\n"
    ":2: loss: must be a table, got 'dpo'\n:3: data: must be an array, got 'd'",
    "model.name = 'm'\nmodel.attention = 'flex'\ntrain.layout = 'padded'\ndata = [{ path = 'd' }]":
    ':2: model.attention: "flex" computes tree and packed rows only; set train.layout = "auto", or remove it',
    "model.name = 'm'\nmodel.attention = 'varlen'\ntrain.layout = 'padded'\ndata = [{ path = 'd' }]":
    ':2: model.attention: "varlen" computes tree and packed rows only; set train.layout = "auto", or remove it',
    "data = [{ path = 'd' }]\n[model]\nname = 'm'\nquantization = 'int4'\nliger = 'yes'\nattention = 'no'\n[model.x]":
    ":4: model.quantization: must be one of none, nf4, int8, got 'int4' (did you mean 'int8'?)\n"
    ":5: model.liger: must be a valid boolean, or must be one of auto, got 'yes'\n"
    ":6: model.attention: must be one of auto, flex, varlen, sdpa, got 'no'\n:7: model.x: unknown key",
    f"{BASE}train.batch =": ":5: not valid TOML: Invalid value",
    f"{BASE}path = 'e'": ":5: not valid TOML: Cannot overwrite a value",
    f'{BASE}[tokens]\nchat_template = """\n\n': ":6: not valid TOML: Unterminated string",
}  # fmt: skip


@pytest.mark.parametrize(("text", "messages"), WHOLE.items(), ids=WHOLE)
def test_mistakes_of_a_whole_file(tmp_path: Path, text: str, messages: str):
    """A missing key has no line; a syntax error is reported alone, with its line."""
    assert mistakes(tmp_path, text) == [f"cfg.toml{line}" for line in messages.splitlines()]


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: None, "there is no such file"),
        (lambda path: path.mkdir(), "this is a folder; a config is a .toml file"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read: 'utf-8' codec can't decode"),
    ],
    ids=["missing", "a folder", "not text"],
)
def test_a_config_that_cannot_be_read(tmp_path: Path, make: Any, what: str):
    """One message names the file and the reason."""
    path = tmp_path / "cfg.toml"
    make(path)
    with pytest.raises(UserError, match=re.escape(f"{path}: {what}")):
        load_config(path)


def test_another_trainers_config_is_told_how_it_is_translated(tmp_path: Path):
    """A YAML file is one message, with the command that translates it."""
    path = tmp_path / "cfg.yaml"
    path.write_text("base_model: m\nrl: dpo\n")
    with pytest.raises(
        UserError, match=r"cfg.yaml: this is YAML, .*`fastpref init` with --from-axolotl, --from-trl or"
    ):
        load_config(path)


def test_a_colon_in_the_path_keeps_the_order(tmp_path: Path):
    """Mistakes are in file order, whatever the file's name."""
    folder = tmp_path / "a:9: b"
    folder.mkdir()
    text = BASE + "\n" * 10 + "[train]\nbatch = 0\n[loss]\nbeta = 0\n[lora]\nrank = 0\n"
    places = [line.partition("cfg.toml:")[2].partition(":")[0] for line in mistakes(folder, text)]
    assert places == ["16", "18", "20"]


# --- Overrides -----------------------------------------------------------------------------------------------------

OVERRIDABLE = BASE + '[[data]]\npath = "e"\n[lora]\ntarget = ["q"]\n[train]\nbatch = 4\n'
OVERRIDES: dict[str, Any] = {  # override: the value of its dotted key
    "train.batch=8": 8,
    "train.batch = 8": 8,
    "train.learning_rate=1e-5": 1e-5,
    "train.checkpointing=true": True,
    "train.schedule=linear": "linear",
    "train.schedule='linear'": "linear",
    "model.name=org/some-model_1.5": "org/some-model_1.5",
    "model.name='two words = one'": "two words = one",
    'model.name="\\u00e9"': "é",
    'lora.target=["k", "v"]': ("k", "v"),
    "lora.target='.*layers.1.*(q|k)_proj'": (".*layers.1.*(q|k)_proj",),
    "lora.exclude='.*vision.*'": (".*vision.*",),
    "lora.target=all-linear": "all-linear",
    "loss.type=kto": "kto",
    "output.dir=~/runs/a": "~/runs/a",
    "data.0.path=x.jsonl": "x.jsonl",
    "data.1.rows=3": 3,
    "reference={mode='copy'}": "copy",
    'eval.data=[{path="h"}]': "h",
}


@pytest.mark.parametrize(("override", "value"), OVERRIDES.items(), ids=OVERRIDES)
def test_an_override_sets_its_key(tmp_path: Path, override: str, value: Any):
    """`a.b=value` sets one key to a TOML value, or to a bare word as a string; entries of arrays count from 0."""
    config = load(tmp_path, OVERRIDABLE, [override])
    path = {"reference": "reference.mode", "eval.data": "eval.data.0.path"}
    key = override.partition("=")[0].strip()
    result: Any = config
    for part in path.get(key, key).split("."):
        result = result[int(part)] if part.isdigit() else getattr(result, part)
    assert result == value


def test_overrides_replace_and_follow_each_other(tmp_path: Path):
    """The last override of a key wins, and keys next to it keep the file's value."""
    config = load(tmp_path, OVERRIDABLE, ["train.batch=8", "train.seed=1", "train.batch=2", "data.1.path=z"])
    assert (config.train.batch, config.train.seed) == (2, 1)
    assert [data.path for data in config.data] == ["d", "z"]


BAD_OVERRIDES: dict[str, str] = {
    "train.batch": "not of the form key=value, such as 'train.steps=100'",
    "=3": "not of the form key=value, such as 'train.steps=100'",
    "train..batch=3": "not of the form key=value, such as 'train.steps=100'",
    "train.batch=": "the value is not valid TOML: Invalid value",
    "train.layout=[1": "the value is not valid TOML: Unclosed array",
    "model.name=two words": "the value is not valid TOML: Invalid value",
    "train.batch=0": "train.batch: must be greater than or equal to 1, got 0",
    "train={batch=0}": "train.batch: must be greater than or equal to 1, got 0",
    "train.sed=3": "train.sed: unknown key (did you mean 'seed'?)",
    "trian.seed=3": "trian: unknown key (did you mean 'train'?)",
    "train=3": "train: must be a table, got 3",
    "train.batch.x=3": "train.batch is a value, not a table",
    "data=3": "data: must be an array, got 3",
    "data.1.rows=0": "data[1].rows: must be greater than or equal to 1, got 0",
    "data.2.path=x": "there is no entry 2; the config has 2, counted from 0",
    "data.x.path=x": "there is no entry x; the config has 2, counted from 0",
    "data.².path=x": "there is no entry ²; the config has 2, counted from 0",
    "eval.data.0.path=x": "there is no entry 0; the config has 0, counted from 0",
    "data.path=x": "data is an array; set a key of an entry, data.0.KEY, or all of it",
    "lora.target.0=x": "lora.target is an array; set a key of an entry, lora.target.0.KEY, or all of it",
    "lora.target.0.x=1": "lora.target.0 is a value, not a table",
    "loss.type=kot": f"loss.type: must be one of {LOSSES}, got 'kot' (did you mean 'kto'?)",
    "eval.every=2": "eval.every: there is nothing to evaluate on; set eval.fraction or add [[eval.data]]",
}


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES.items(), ids=BAD_OVERRIDES)
def test_a_mistake_in_an_override_names_it(tmp_path: Path, override: str, message: str):
    """A mistake in a key that an override set is reported with the override instead of the file's line."""
    (line,) = mistakes(tmp_path, OVERRIDABLE, [override])
    assert line.startswith(f"override {override!r}: {message}")


def test_mistakes_of_file_and_overrides_together(tmp_path: Path):
    """Overrides and the file are checked at once; a mistake that an override causes elsewhere has the file's line."""
    text = BASE + '[loss]\nvariants = ["sft"]\n[train]\nbatch = 0\n'
    assert mistakes(tmp_path, text, ["loss.type=kto", "train.sed=1"]) == [
        "override 'train.sed=1': train.sed: unknown key (did you mean 'seed'?)",
        "cfg.toml:6: loss.variants: this loss has no such key; it belongs to dpo",
        "cfg.toml:8: train.batch: must be greater than or equal to 1, got 0",
    ]


# --- What loads ----------------------------------------------------------------------------------------------------


def test_paths_are_taken_from_the_configs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Models, data and templates that exist in the config's folder become absolute; other names do not change."""
    home = tmp_path / "home"
    (home / "model").mkdir(parents=True)
    for name in ("d.jsonl", "h.jsonl", "t.jinja"):
        (home / name).write_text("x")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    text = (
        '[model]\nname = "model"\n[[data]]\npath = "d.jsonl"\n[[data]]\npath = "org/name"\n'
        '[[data]]\npath = "~no-such-person/x"\n'
        '[[eval.data]]\npath = "h.jsonl"\n[tokens]\nchat_template = "t.jinja"\n[output]\ndir = "runs/x"\n'
    )
    config = load(home, text)
    assert config.model.name == str(home / "model")
    assert [data.path for data in config.data] == [str(home / "d.jsonl"), "org/name", "~no-such-person/x"]
    assert config.eval.data[0].path == str(home / "h.jsonl")
    assert config.tokens.chat_template == str(home / "t.jinja")
    assert config.output.dir == "runs/x"
    jinja = "{% for m in messages %}" + "{{ m['content'] }}" * 500 + "{% endfor %}"
    for name, found in (("t.jinja", str(home / "t.jinja")), ("chatml", "chatml"), (jinja, jinja)):
        text = f"{BASE}[data.format]\ntype = 'chat_template.default'\nchat_template = '''{name}'''\n"
        assert load(home, text).data[0].format == {"type": "chat_template.default", "chat_template": found}
    (home / "mine.py").write_text("")
    for name, found in (("mine:read", f"{home / 'mine.py'}:read"), ("json:loads", "json:loads")):
        assert load(home, f'{BASE}format = "{name}"\n').data[0].format == found
    assert load(home, f"{BASE}[tokens]\nchat_template = '''{jinja}'''\n").tokens.chat_template == jinja


def test_a_loss_of_lists_makes_no_pairs(tmp_path: Path):
    """The keys that make pairs are refused for a loss that takes lists whole, each with its source."""
    given = load(tmp_path, BASE + "pairs = 'all'\nmin_difference = 1\n[[data]]\npath = 'e'\nmin_difference = 2\n")
    check: Any = of_lists(given)._sections_agree
    with pytest.raises(ValueError, match="takes lists") as caught:
        check()
    assert [line.partition(": ")[0] for line in str(caught.value).splitlines()] == [
        "data.0.pairs", "data.0.min_difference", "data.1.min_difference",
    ]  # fmt: skip


def test_a_config_is_frozen(tmp_path: Path):
    """No key of a loaded config can be set, in any table."""
    config = load(tmp_path, BASE + "[lora]\n")
    tables: list[Any] = [config, config.model, config.lora, config.data[0], config.train, config.eval, config.tokens]
    for table in [*tables, config.reference, config.output, config.log]:
        key = next(iter(type(table).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(table, key, getattr(table, key))
    loss: Any = config.loss
    with pytest.raises(FrozenInstanceError):
        loss.beta = 1.0


@pytest.mark.parametrize(
    ("added", "rate", "tokens"),
    [
        ("", 1e-6, 4096),
        ("[lora]\n", 1e-4, 4096),
        ("[lora]\n[train]\nlearning_rate = 3e-4\ntokens_per_microbatch = 7\n", 3e-4, 7),
        ("[tokens]\nmax_length = 512\n", 1e-6, 1024),
    ],
)
def test_what_left_out_keys_become(tmp_path: Path, added: str, rate: float, tokens: int):
    """The default learning rate depends on [lora], and a micro-batch's tokens on tokens.max_length."""
    config = load(tmp_path, BASE + added)
    assert (config.learning_rate, config.tokens_per_microbatch) == (rate, tokens)


@pytest.mark.parametrize("options", get_args(LossOptions))
def test_every_loss_loads(tmp_path: Path, options: type[LossOptions]):
    """`loss.type` selects the loss's own options with their defaults; without a table the loss is DPO."""
    assert load(tmp_path, f'{BASE}[loss]\ntype = "{options.__name__.lower()}"\n').loss == options()
    assert load(tmp_path, BASE).loss == load(tmp_path, BASE + "[loss]\nbeta = 0.1\n").loss == DPO()


# --- Back to TOML --------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.floats(1e-300, 1e300)
FORMAT = st.sampled_from(["chatml.intel", "mine:read"]) | st.fixed_dictionaries(
    {"type": st.just("chat_template.default")},
    optional={
        "roles": st.dictionaries(TEXT, st.lists(TEXT, max_size=2), max_size=2),
        "chat_template": TEXT,
        "tools": st.lists(st.dictionaries(TEXT, TEXT | st.booleans(), max_size=2), max_size=2),
    },
)
DATA = st.fixed_dictionaries(
    {"path": TEXT},
    optional={
        **dict.fromkeys(("split", "name", "revision"), TEXT),
        **{"rows": st.integers(1, 10**18), "weight": NUMBER, "format": FORMAT},
    },
)
LOSS = st.one_of(
    st.fixed_dictionaries(
        {"variants": st.lists(st.sampled_from(["sigmoid", "sft", "aot"]), min_size=1, unique=True)},
        optional={"beta": NUMBER, "f_divergence": st.sampled_from(["js", "alpha"])},
    ),
    st.fixed_dictionaries({"weights": st.lists(NUMBER, min_size=1, max_size=1)}),
    st.fixed_dictionaries({"type": st.sampled_from(["ipo", "orpo", "cpo"]), "beta": NUMBER}),
    st.fixed_dictionaries({"type": st.just("kto"), "desirable_weight": NUMBER}),
    st.fixed_dictionaries({"type": st.just("simpo"), "gamma": st.floats(allow_nan=False, allow_infinity=False)}),
)
CONFIG = st.fixed_dictionaries(
    {"model": st.fixed_dictionaries({"name": TEXT}), "data": st.lists(DATA, min_size=1, max_size=3)},
    optional={
        "lora": st.fixed_dictionaries(
            {}, optional={"target": st.lists(TEXT.map(re.escape), max_size=3), "rslora": st.booleans(), "alpha": NUMBER}
        ),
        "loss": LOSS,
        "eval": st.fixed_dictionaries({"data": st.lists(DATA, min_size=1, max_size=2), "every": st.integers(1, 9)})
        | st.fixed_dictionaries({"fraction": st.floats(1e-9, 1, exclude_max=True)}),
        "tokens": st.fixed_dictionaries({"chat_template": TEXT}),
        "train": st.fixed_dictionaries({}, optional={"learning_rate": NUMBER, "checkpointing": st.booleans()}),
        "output": st.fixed_dictionaries({"dir": TEXT}),
    },
)


@settings(max_examples=150, deadline=None)
@given(raw=CONFIG)
def test_toml_written_is_the_config_read(raw: dict[str, Any]):
    """Writing with `to_toml` and reading gives the same config, with any characters in its strings."""
    config = Config.model_validate(raw)
    assert Config.model_validate(tomllib.loads(to_toml(config))) == config


def test_a_written_file_loads_as_the_same_config(tmp_path: Path):
    """A run's config.toml is a valid config, with quotes, line ends, control characters and nested data."""
    text = BASE + (
        '[[data]]\npath = "C:\\\\a \\"b\\" \\u0001\\u007f\\t é 🎉"\nrows = 3\n[[eval.data]]\npath = "x\\ny"\n'
        '[[eval.data]]\npath = "z"\n[tokens]\nchat_template = """{% if a %}\n  \'b\'\r\n{% endif %}"""\n'
        '[loss]\nvariants = ["sigmoid", "sft"]\nweights = [1, 0.5]\n[train]\nlearning_rate = 1e-7\n'
    )
    config = load(tmp_path, text)
    assert load(tmp_path, to_toml(config)) == config
    assert "steps" not in to_toml(config)  # keys without a value are omitted
    assert "[lora]" not in to_toml(config)


def test_only_a_model_and_data_are_required():
    """A missing table means its defaults; without [lora] there are no adapters, and without [loss] the loss is DPO."""
    config = Config.model_validate(SMALLEST)
    tables = {name: {} for name in ("eval", "tokens", "reference", "train", "output", "log")}
    assert config == Config.model_validate(SMALLEST | tables)
    assert (config.lora, config.loss) == (None, DPO())
