"""The command line: parse, call, save. Importing this file imports neither torch nor transformers."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from locedit import __version__
from locedit.errors import LoceditError

EPILOG = """\
examples:
  locedit demo
  locedit check MODEL facts.jsonl
  locedit localize MODEL facts.jsonl --method depn --top 50 --out runs/a
  locedit edit MODEL my_task/ --within runs/a/components.json --method npo --out runs/a
  locedit evaluate MODEL my_task/ --edit runs/a/edit --attacks relearn --out runs/a
  locedit report runs/a --out report.html
  locedit study study.toml --jobs 2
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit status: 0 done, 2 something the user can mend, 130 Ctrl-C, 1 a defect of locedit."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        args = parse_arguments(arguments)
        from locedit.commands import run

        return run(args)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of stdout has gone, as in `locedit methods | head`
        return 0
    except KeyboardInterrupt:
        return _say("interrupted; nothing half-written was left; the same command goes on where this one stopped", 130)
    except Exception as error:
        if "--debug" in arguments:
            raise
        return _explain(error)


def _explain(error: Exception) -> int:
    """One line for an error, and its exit status."""
    if isinstance(error, LoceditError):
        return _say(f"error: {' '.join(str(error).split())}", 2)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return _say(f"error: {where}{error.strerror or error}", 2)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _say("error: out of memory; try a smaller --batch-size, --dtype bfloat16, or hold=adapter", 2)
    text = " ".join(str(error).split())
    return _say(f"unexpected error in locedit: {type(error).__name__}: {text}; --debug shows the traceback", 1)


def _say(message: str, status: int) -> int:
    sys.stderr.write(f"locedit: {message}\n")
    return status


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; what is left over are options of the method, as `--name value`, kept in `extra`."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest and args.command not in ("localize", "edit", "evaluate", "demo", "grade", "circuit", "spans", "sisa"):
        parser.error(f"unknown argument {rest[0]!r}")
    args.extra = _pairs(parser, rest)
    return args


def _pairs(parser: argparse.ArgumentParser, words: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--") or len(word) < 3:
            parser.error(f"unexpected argument {word!r}")
        name, equals, value = word[2:].partition("=")
        if not equals:
            if not queue or queue[0].startswith("--"):
                parser.error(f"{word} needs a value")
            value = queue.pop(0)
        pairs[name.replace("-", "_")] = value
    return pairs


def build_parser() -> argparse.ArgumentParser:
    """All commands and their arguments."""
    parser = _Parser(
        prog="locedit",
        description="Find where a language model keeps a piece of knowledge, change it only there, and show whether "
        "it is gone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"locedit {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    for add in (_demo, _check, _lab, _localize, _circuit, _edit, _evaluate, _report, _export, _grade, _study, _spans):
        add(commands)
    for add in (_sisa, _harness, _methods, _metrics):
        add(commands)
    return parser


Commands = argparse._SubParsersAction  # pyright: ignore[reportPrivateUsage]


def _command(commands: Commands, name: str, text: str, more: str = "") -> argparse.ArgumentParser:  # type: ignore[type-arg]
    parser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}. {more}".strip(), allow_abbrev=False
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _model_and_data(
    parser: argparse.ArgumentParser, *, nargs: str | None = None, model_nargs: str | None = None
) -> None:
    parser.add_argument(
        "model", metavar="MODEL", nargs=model_nargs, help="a folder with a transformers model, or a hub id"
    )
    parser.add_argument("data", metavar="DATA", nargs=nargs, help="a JSON-lines file, a task folder or a task .toml")
    parser.add_argument(
        "--fields", metavar="A=B,...", help="rename fields of the data, e.g. prompt=question,answer=response"
    )
    parser.add_argument(
        "--where", metavar="FIELD=VALUE,...", help="use only these forget items, e.g. format=statement,group=sport"
    )
    parser.add_argument(
        "--chat",
        default="off",
        metavar="auto|off|TEMPLATE",
        help="send prompts through the chat template (default off)",
    )
    _placement(parser)


def _placement(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", metavar="FOLDER", help="where the tokenizer is, when not beside the model")
    parser.add_argument("--dtype", default="auto", help="auto (of the checkpoint), float32, bfloat16, float16")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--device-map", default=None, metavar="MAP", help="auto spreads a large model over several GPUs"
    )


def _out(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument("--out", required=required, metavar="FOLDER", help="the run folder to write to")
    parser.add_argument("--force", action="store_true", help="replace results that are there already")


METHOD_OPTIONS = "Options of the method are given the same way, e.g. --steps 20; `locedit methods NAME` lists them."


def _demo(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(commands, "demo", "run the whole flow on a lab model and write a report")
    parser.add_argument("--out", default="runs/demo", metavar="FOLDER", help="default runs/demo")
    parser.add_argument("--arch", default="gpt2", help="architecture of the lab model: gpt2 or llama (default gpt2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="start afresh")


def _check(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(
        commands, "check", "say what the model knows of the data, which methods can run, and what they cost"
    )
    _model_and_data(parser)


def _lab(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(
        commands,
        "lab",
        "make a small world and train a model on it",
        "Writes model/, facts/, private/ and bias/ as ordinary files.",
    )
    parser.add_argument(
        "world",
        nargs="?",
        default="facts",
        help="facts, private or bias, written together (default facts); habit or groups, with models of their own",
    )
    parser.add_argument("--arch", default="gpt2", help="gpt2, llama, neox or bert (default gpt2)")
    parser.add_argument("--size", default="small", help="small (minutes) or tiny (half a minute)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start", action="store_true", help="also the model before the data, which some recipes need (start/)"
    )
    parser.add_argument(
        "--contexts",
        action="store_true",
        help="half of the training texts stand after other texts, so that prompting attacks can show something",
    )
    _out(parser)


def _localize(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(commands, "localize", "score components by how much they matter for the data", METHOD_OPTIONS)
    _model_and_data(parser)
    parser.add_argument(
        "--method",
        default="depn",
        metavar="NAME[,NAME]",
        help="localizers, see `locedit methods` (default depn); the first one's set becomes components.json",
    )
    budget = parser.add_argument_group("which components to keep (one of)")
    budget.add_argument("--top", type=int, metavar="K", help="the K best")
    budget.add_argument("--fraction", type=float, metavar="F", help="this share of all")
    budget.add_argument("--params", type=int, metavar="N", help="the best that hold N parameters; see --fill")
    budget.add_argument(
        "--params-like", metavar="FILE", help="the best that hold as many parameters as this components.json"
    )
    budget.add_argument(
        "--threshold", type=float, metavar="T", help="those with at least this share of the largest score"
    )
    budget.add_argument(
        "--shared", type=float, metavar="S", help="those above the method's threshold in this share of the examples"
    )
    parser.add_argument(
        "--fill",
        metavar="under|reach",
        help="with --params: stop before the budget is passed, or when it is reached or passed "
        "(default under, for several methods and --params-like reach)",
    )
    parser.add_argument("--sign", default="positive", help="positive, negative or absolute (default positive)")
    parser.add_argument("--minus", metavar="FILE", help="control prompts whose scores are subtracted")
    _out(parser)


def _circuit(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(
        commands,
        "circuit",
        "measure how faithful circuits of the best components are, or write scores for the MIB circuit track",
        "With DATA (pairs or facts): the metric with all but the best 0.1 % to 100 % ablated, and the areas CPR and "
        "CMD. Options are given as --ablation mean, --rank size, --metric probability, --corrupt noise; "
        "locedit.faithfulness.FaithfulnessOptions lists them.",
    )
    _model_and_data(parser, nargs="?")
    parser.add_argument(
        "--scores", required=True, metavar="FOLDER", help="runs/a/localize/eap_ig, or an importances.json"
    )
    parser.add_argument("--mib", metavar="FILE", help="write the scores and edges as an importances.json")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def _edit(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(commands, "edit", "change the model inside a component set", METHOD_OPTIONS)
    _model_and_data(parser)
    parser.add_argument("--within", metavar="FILE", help="components.json; without it the whole model may change")
    parser.add_argument(
        "--method",
        default="npo",
        metavar="NAME",
        help="see `locedit methods` (default npo); npo+0.5*ga trains several at once",
    )
    parser.add_argument(
        "--hold", help="how the change is held: weights, adapter or hooks (default: the first that the method knows)"
    )
    parser.add_argument(
        "--controls", type=int, default=0, metavar="N", help="also N random sets of the same size and everything"
    )
    parser.add_argument(
        "--requests",
        metavar="FIELD|FILE,...",
        help="deletion requests one after another, all measured again at the end: one for each owner, group or format "
        "of the forget data, or DATA and then these files",
    )
    _out(parser)


def _evaluate(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(
        commands,
        "evaluate",
        "measure a model, before and after an edit, and attack it",
        "Options of the metrics and the attacks are given the same way: --extraction-n 5 (n of extraction_likelihood), "
        "--extraction-length, --s-el-n, --exposure-samples, --batch-size, --draws; `locedit metrics` lists them, "
        "`locedit methods relearn` those of the attack, which has a name that both have.",
    )
    _model_and_data(parser)
    parser.add_argument("--edit", metavar="FOLDER", help="an edit folder; without it the model is measured as it is")
    parser.add_argument("--metrics", metavar="NAME,...", help="only these, see `locedit metrics`")
    parser.add_argument("--attacks", metavar="NAME,...", help="e.g. relearn")
    parser.add_argument("--seed", type=int, default=0)
    _out(parser)


def _report(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(commands, "report", "write one self-contained HTML page about one or more runs")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--out", required=True, metavar="FILE", help="the page to write")
    parser.add_argument("--force", action="store_true", help="replace the page if it exists")


def _export(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(commands, "export", "write the edited model as an ordinary transformers folder")
    parser.add_argument("model", metavar="MODEL", help="the model that the edit was made for")
    parser.add_argument("--edit", required=True, metavar="FOLDER")
    _placement(parser)
    _out(parser)


def _grade(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(
        commands,
        "grade",
        "grade localizers on lab models where the truth is known",
        "Facts planted in known places, deletion of what was found, and an oracle of edited and attacked places. "
        "The same command goes on where it was stopped. Options of the grading are given as --draws 2, --units neuron; "
        "locedit.grading.GradeOptions lists them.",
    )
    parser.add_argument("--arch", default="gpt2", help="architecture of the labs (default gpt2)")
    parser.add_argument("--size", default="small", help="small or tiny (default small)")
    parser.add_argument("--seeds", default="0,1,2", metavar="N,...", help="labs of these seeds (default 0,1,2)")
    parser.add_argument("--methods", default="all", metavar="NAME,...", help="localizers (default all)")
    parser.add_argument(
        "--parts",
        default="planted,deletion,oracle",
        metavar="NAME,...",
        help="planted, deletion, oracle (default all three)",
    )
    _out(parser)


def _harness(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(
        commands,
        "harness",
        "run tasks of lm-evaluation-harness before and after an edit",
        "Needs the extra: pip install 'locedit[harness]'. The data of its built-in tasks come from the hub; tasks of "
        "--include-path may have local data, and then nothing is downloaded.",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder with a transformers model, or a hub id")
    parser.add_argument(
        "--tasks", required=True, metavar="NAME,...", help="as of lm_eval, e.g. arc_easy,lambada_openai"
    )
    parser.add_argument("--edit", metavar="FOLDER", help="an edit folder; without it the model is measured as it is")
    parser.add_argument("--include-path", metavar="FOLDER", help="further tasks, as YAML files of the harness")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    parser.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in the prompt (default: each task's own)"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows in a forward pass (default 8)")
    _placement(parser)
    _out(parser, required=False)


def _study(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(
        commands,
        "study",
        "run a grid of localizers, methods, restrictions, holds, seeds and attacks from one TOML file",
        "Every edit is kept under the content of what made it, so the same command goes on where it was stopped, and a "
        "changed file makes only what changed. Ends with one page; locedit.study.config lists the keys of the file.",
    )
    parser.add_argument("study", metavar="STUDY", help="a study.toml; its paths are relative to the current folder")
    parser.add_argument("--out", metavar="FOLDER", help="default runs/ and the file's name")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="local processes (default 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the edits and about how long they take")


def _spans(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(
        commands,
        "spans",
        "choose which stretches of texts are to be forgotten, and write them as private texts",
        "Rules: given (spans in the data), patterns, fields, surprisal (a model's probabilities), annotator (a model "
        "is asked). MODEL may be left out where nothing needs it; with it spans are widened to whole tokens. Options "
        "of the rule are given the same way, e.g. --patterns email,phone or --mark answer,subject; `locedit methods "
        "RULE` lists them.",
    )
    _model_and_data(parser, model_nargs="?")
    parser.add_argument("--rule", default="patterns", metavar="NAME", help="default patterns")
    parser.add_argument(
        "--scorer", metavar="MODEL", help="a model that has not memorised the texts; start = the task's"
    )
    parser.add_argument("--annotator", metavar="MODEL", help="the model to ask, if not MODEL")
    parser.add_argument(
        "--verify",
        nargs="?",
        const="context",
        choices=("context", "scorer", "annotator"),
        help="keep only spans that depend on what is before them, that MODEL knows better than the scorer, or that the "
        "annotator says yes to (default context)",
    )
    parser.add_argument(
        "--factor", type=float, default=2.0, help="with --verify: how much likelier, per token (default 2)"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the private texts, such as task/forget.jsonl")
    parser.add_argument("--rest", metavar="FILE", help="also what is outside the spans, such as task/retain.jsonl")
    parser.add_argument("--force", action="store_true", help="replace files that are there already")


def _sisa(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(
        commands,
        "sisa",
        "train in shards and slices so that deleting an item is exact, and make the ensemble fair",
        "Starts before a model exists: the members are trained from a model that has not seen the data.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=_Parser)
    train = _command(
        actions,
        "train",
        "train the members; the same command goes on where it was stopped",
        "Options are given the same way: --shards 5, --slices 4, --epochs 10, --learning-rate, --batch-size, --seed; "
        "locedit.sisa.SisaOptions lists them.",
    )
    train.add_argument(
        "data", metavar="DATA", help="labelled texts {id, text, label, group?}, or a task folder with start/"
    )
    train.add_argument("--within", metavar="FILE", help="components.json; without it members may differ anywhere")
    train.add_argument("--hold", default="weights", help="how members are held: weights or adapter (default weights)")
    train.add_argument("--template", metavar="TEXT", help=r"the prompt, with {text} in it (default '{text}\nlabel:')")
    train.add_argument(
        "--words", metavar="LABEL=WORD,...", help="the word of each label (default toxic=toxic,fine=fine)"
    )
    train.add_argument("--out", required=True, metavar="FOLDER", help="the training record to write")
    delete = _command(actions, "delete", "delete items by id: only their shards are trained again, from their slice")
    delete.add_argument("--ids", required=True, metavar="ID,...|FILE", help="ids, or a text file with one a line")
    verify = _command(actions, "verify", "train the shards with deletions from the start, and compare every bit")
    verify.add_argument("--shards", metavar="N,...", help="these shards, from 0")
    evaluate = _command(
        actions, "evaluate", "error and equalised-odds gap of the majority and of the fair predictors, as a table"
    )
    for action in (delete, verify, evaluate):
        action.add_argument("folder", metavar="FOLDER", help="the training record")
    for action in (delete, verify):
        action.add_argument("--data", metavar="DATA", help="the data, if no longer where it was")
    evaluate.add_argument("calibration", metavar="CALIBRATION", help="labelled texts with groups, to fit on")
    evaluate.add_argument("test", metavar="TEST", help="others, to measure on")
    evaluate.add_argument("--positive", metavar="LABEL", help="whose rates are to be equal (default the first label)")
    evaluate.add_argument("--seed", type=int, default=0, help="of the intervals")
    evaluate.add_argument("--out", metavar="FOLDER", help="for the table (default FOLDER/evaluation)")
    evaluate.add_argument("--force", action="store_true", help="replace a table that is there")
    for action in (train, delete, verify, evaluate):
        action.add_argument(
            "--start", metavar="MODEL", help="the model before the data (default: the task's, the record's)"
        )
        action.add_argument("--tokenizer", metavar="FOLDER", help="where the tokenizer is, when not beside the model")
        action.add_argument("--dtype", default="auto", help="auto (of the checkpoint), float32, bfloat16, float16")
        action.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def _methods(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(
        commands,
        "methods",
        "list localizers, unlearning methods, attacks and rules for spans, with papers and requirements",
    )
    parser.add_argument("name", nargs="?", help="one method or rule: its options, their types and defaults")


def _metrics(commands: Commands) -> None:  # type: ignore[type-arg]
    parser = _command(commands, "metrics", "list the metrics, with definition and direction")
    parser.add_argument("name", nargs="?")


if __name__ == "__main__":
    sys.exit(main())
