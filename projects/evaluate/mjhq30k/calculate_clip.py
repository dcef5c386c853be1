"""CLIP score of MJHQ-30K: calculate_clip.py META.json F.safetensors --save-stats, then calculate_clip.py F.safetensors DIR"""

from tim.cli import run_command
from tim.evaluation.commands import mjhq_clip

if __name__ == "__main__":
    run_command(mjhq_clip)
