"""A Hugging Face Space of the studio."""

import os

from tim.demo.studio import serve

serve(os.environ.get("TIM_PIPELINE", "pipeline"), host="0.0.0.0", port=7860)
