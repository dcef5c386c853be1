# The library, its commands and the evaluation.
#   docker build -t tim .                                                                    CPU, or any GPU whose driver suits torch's wheel
#   docker build -t tim --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .            CUDA's own libraries in the image
#   docker build -t tim --build-arg PIP_ARGS="--extra-index-url ADDRESS" .                   torch's CPU wheels, from where you get them
#   docker run --gpus all --shm-size 16g -v "$PWD/datasets:/opt/tim/datasets" -v "$PWD/workdir:/opt/tim/workdir" tim \
#     bash scripts/train/c2i/train_tim_c2i_b.sh
# The base needs Python 3.10 to 3.13, or apt to install it.
ARG BASE=python:3.12-slim
FROM ${BASE}

RUN command -v python3 || { \
      apt-get update && \
      DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 python3-dev python3-venv && \
      rm -rf /var/lib/apt/lists/*; }
# torch.compile on a GPU builds its kernels with a C compiler
RUN command -v cc || { \
      apt-get update && \
      DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends gcc libc6-dev && \
      rm -rf /var/lib/apt/lists/*; }
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHON=/opt/venv/bin/python PYTHONUNBUFFERED=1

WORKDIR /opt/tim
ARG PIP_ARGS=""
COPY requirements.txt ./
RUN pip install --no-cache-dir ${PIP_ARGS} -r requirements.txt
COPY . .
RUN pip install --no-cache-dir --no-deps -e .

CMD ["tim-train", "--help"]
