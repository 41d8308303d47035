"""How closely a student follows its teacher, right or wrong.

A student can be as accurate as its teacher without having learned from it, so fidelity is measured apart
from accuracy (Stanton et al., 2021, arXiv:2106.05945), and on samples that the student was not trained on.
Accuracy is in :mod:`transfuse.measure.classification`.
"""

from __future__ import annotations

from torch import Tensor

from transfuse.core.errors import ShapeError
from transfuse.losses.divergence import kl_divergence
from transfuse.measure.checks import check_pair


def agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1 where student and teacher predict the same class, else 0.

    Args:
        student_logits: `(samples, classes)`.
        teacher_logits: `(samples, classes)`, of the same samples.

    Returns:
        `(samples,)` float.

    Raises:
        ShapeError: not `(samples, classes)`, or different numbers of samples.
        VocabularyError: different numbers of classes.
        InputError: a sample's logits are NaN or infinite.
    """
    student, teacher = check_pair(student_logits, teacher_logits)
    return (student.argmax(dim=1) == teacher.argmax(dim=1)).float()


def held_out_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """`KL(teacher || student)` in nats, `(samples,)`; arguments and errors as in :func:`agreement`."""
    student, teacher = check_pair(student_logits, teacher_logits)
    return kl_divergence(student, teacher, direction="teacher_to_student", temperature=1.0)


def disagreement(student_logits: Tensor, teacher_logits: Tensor, classes: int) -> Tensor:
    """How often the teacher says the row's class and the student, differing, the column's.

    Args:
        student_logits: `(samples, classes)`.
        teacher_logits: `(samples, classes)`, of the same samples.
        classes: how many there are.

    Returns:
        `(classes, classes)` int64 with a diagonal of zeros.

    Raises:
        ShapeError: the logits have another number of classes; as in :func:`agreement`.
        VocabularyError, InputError: as in :func:`agreement`.
    """
    student, teacher = check_pair(student_logits, teacher_logits)
    if student.shape[1] != classes:
        raise ShapeError(f"expected logits for {classes} classes, found {student.shape[1]}")
    cells = teacher.argmax(dim=1) * classes + student.argmax(dim=1)
    table = cells.bincount(minlength=classes**2).view(classes, classes)
    return table.fill_diagonal_(0)
