import math

import pytest
import torch
from sklearn.metrics import confusion_matrix

from transfuse.core.errors import InputError, ShapeError, VocabularyError
from transfuse.measure import agreement, disagreement, held_out_kl

STUDENT = torch.randn(80, 5, generator=torch.Generator().manual_seed(0))
TEACHER = STUDENT + torch.randn(80, 5, generator=torch.Generator().manual_seed(1))


def test_a_copy_agrees_everywhere():
    assert agreement(TEACHER, TEACHER).tolist() == [1.0] * 80
    assert held_out_kl(TEACHER, TEACHER).abs().max() < 1e-6
    assert disagreement(TEACHER, TEACHER, classes=5).sum() == 0


def test_agreement_looks_at_the_predicted_class_only():
    student = torch.tensor([[0.1, 0.0], [0.0, 0.1]])
    teacher = torch.tensor([[9.0, 0.0], [9.0, 0.0]])
    assert agreement(student, teacher).tolist() == [1.0, 0.0]


def test_held_out_kl_is_from_teacher_to_student_in_nats():
    expected = []
    for student, teacher in zip(STUDENT.double().softmax(1), TEACHER.double().softmax(1), strict=True):
        expected.append(sum(t * math.log(t / s) for s, t in zip(student.tolist(), teacher.tolist(), strict=True)))
    assert held_out_kl(STUDENT, TEACHER).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert held_out_kl(TEACHER, STUDENT).tolist() != pytest.approx(expected, rel=0.1)


def test_disagreement_is_the_confusion_matrix_without_its_diagonal():
    expected = confusion_matrix(TEACHER.argmax(1), STUDENT.argmax(1), labels=range(5))
    for i in range(5):
        expected[i, i] = 0
    table = disagreement(STUDENT, TEACHER, classes=5)
    assert table.tolist() == expected.tolist()
    assert table.sum() == 80 - agreement(STUDENT, TEACHER).sum()


@pytest.mark.parametrize("measure", [agreement, held_out_kl, lambda s, t: disagreement(s, t, classes=5)])
def test_refuses_what_cannot_be_compared(measure):
    with pytest.raises(ShapeError, match="80 samples, the teacher for 79"):
        measure(STUDENT, TEACHER[:-1])
    with pytest.raises(VocabularyError, match="5 classes, the teacher 4"):
        measure(STUDENT, TEACHER[:, :4])
    with pytest.raises(InputError, match="NaN"):
        measure(STUDENT, TEACHER * torch.nan)


def test_refuses_another_number_of_classes():
    with pytest.raises(ShapeError, match="6 classes, found 5"):
        disagreement(STUDENT, TEACHER, classes=6)
