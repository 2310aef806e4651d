"""SISA: training in shards and slices so that deleting an item is cheap and exact, and FairSISA on top of it.

This starts before a model exists, beside the main flow of localizing and editing: unlearning here is training again,
from the last checkpoint that never saw the item (Bourtoule et al. 2021, arXiv:1912.03817). Every shard has a member, an
Edit of the start model, in the whole model, inside a component set, or as a LoRA. The training record says which item
is where; a deletion trains only its shards, from its slice, and the result is bit for bit what training without the
item gives. "Without" keeps every other item in its shard and slice, and means relative to a start that never saw the
data.

The published code cuts slices at n // R, trains the last one on the remainder too, and leaves the remainder out of its
checkpoint's name, so that a deleted item of the tail is served again. Here slices end at n * (k + 1) // R, and a
checkpoint's name is a hash of exactly the items that it was trained on.

FairSISA (Kadhe et al. 2023, arXiv:2312.07420) equalises the odds of a group's members being called toxic, after the
ensemble is trained. These predictors have no parameters of the model, so localization does not apply to them; they are
fitted on calibration data, and are to be fitted again after a deletion.
"""

from locedit.sisa.deletion import Certificate, certificates, delete
from locedit.sisa.ensemble import Ensemble, majority, mean_probability, votes
from locedit.sisa.options import SisaOptions
from locedit.sisa.record import Record
from locedit.sisa.start import train
from locedit.sisa.training import Made
from locedit.sisa.verification import Verified, verify

__all__ = [
    "Certificate",
    "Ensemble",
    "Made",
    "Record",
    "SisaOptions",
    "Verified",
    "certificates",
    "delete",
    "majority",
    "mean_probability",
    "train",
    "verify",
    "votes",
]
