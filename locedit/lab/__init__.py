"""Small worlds and the models trained on them: people with facts, private records, ordinary sentences around them."""

from locedit._callable import make_callable
from locedit.lab.architectures import ARCHITECTURES
from locedit.lab.making import Lab, lab, write_lab
from locedit.lab.world import WORLDS

__all__ = ["ARCHITECTURES", "WORLDS", "Lab", "lab", "write_lab"]

make_callable(__name__)
