# fastpref for a machine with an NVIDIA GPU. torch's wheels bring CUDA's libraries, so the machine needs Docker, the
# driver and the NVIDIA Container Toolkit, and no CUDA. docs/docker.md says more.
#
#   docker build -t fastpref .
#   docker run --rm -it --gpus all --ipc=host --user "$(id -u):$(id -g)" \
#     -v "$PWD:/work" -v fastpref-cache:/cache fastpref train my.toml

FROM python:3.12-slim-bookworm

# Triton compiles a launcher for each kernel when it is first used, and torch's compiler C++. Any version of g++ does.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# The tested versions of the dependencies, in a layer of its own, which a change of the code leaves alone.
WORKDIR /src
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        extras = project['optional-dependencies']; \
        print('\n'.join([*project['dependencies'], *extras['export'], *extras['schedule-free']]))" > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt

COPY README.md LICENSE ./
COPY kernels kernels
COPY fastpref fastpref
RUN pip install --no-cache-dir --no-deps -c constraints.txt . \
    && fastpref --version

# Whoever runs the container owns what it writes; models, tokens and compiled kernels are kept in the volume /cache.
RUN mkdir --mode=1777 /cache
ENV HOME=/cache USER=fastpref HF_HOME=/cache/huggingface FASTPREF_CACHE=/cache/fastpref \
    TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["fastpref"]
CMD ["--help"]
