from . import backends
from .base_model.loading import load_model
from .data.queries import tokenize_query
from .data.records import read_jsonl
from .evaluation.evaluate import evaluate
from .losses import reference
from .losses.functional import linear_distill, linear_kl, linear_nll
from .losses.modules import LinearKLLoss, LinearNLLLoss, linear_cross_entropy
from .losses.options import LossOptions
from .losses.sketch import TeacherSketch, sketch_teacher
from .student.generation import generate, stream
from .student.model import SoftPromptModel
from .student.soft_prompt import SoftPrompt, SoftPromptConfig
from .teacher.examples import TrainingExample, make_examples
from .teacher.teacher import Teacher
from .training.arguments import SoftPromptTrainingArguments
from .training.trainer import SoftPromptTrainer

__version__: str

__all__ = [
    "LinearKLLoss",
    "LinearNLLLoss",
    "LossOptions",
    "SoftPrompt",
    "SoftPromptConfig",
    "SoftPromptModel",
    "SoftPromptTrainer",
    "SoftPromptTrainingArguments",
    "Teacher",
    "TeacherSketch",
    "TrainingExample",
    "backends",
    "evaluate",
    "generate",
    "linear_cross_entropy",
    "linear_distill",
    "linear_kl",
    "linear_nll",
    "load_model",
    "make_examples",
    "read_jsonl",
    "reference",
    "sketch_teacher",
    "stream",
    "tokenize_query",
]
