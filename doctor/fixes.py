"""Fixes whose text differs between container runtimes. Fixes with a single text are in the checks' own modules."""

from dataclasses import dataclass

from doctor.runtime import Runtime


@dataclass(frozen=True)
class Fix:
    """The fix of a problem: what to type on each container runtime. An empty text falls back to `host`."""

    host: str = ""
    docker: str = ""
    compose: str = ""
    kubernetes: str = ""

    def text(self, runtime: Runtime) -> str:
        return str(getattr(self, runtime.value)) or self.host


# Settings and member list

SERVICE_LINKS = Fix(
    host="rename the Service, or set the variable to a port number",
    kubernetes="set enableServiceLinks: false in the pod's spec, or rename the Service",
)
MEMBER_LIST = Fix(
    host='correct the list: {"x_part0": {"name": "x_part0", "ip": "10.0.0.5", "port": 10000}, …}',
    kubernetes="correct the ConfigMap that holds the list, and restart all parts",
)
UNSET_MULTIPROC_DIR = Fix(
    host="unset PROMETHEUS_MULTIPROC_DIR", kubernetes="remove PROMETHEUS_MULTIPROC_DIR from the pod's env"
)
SAME_ENVIRONMENT = Fix(
    host="give all parts the same environment; only WORLD_RANK, START_PORT and CUDA_VISIBLE_DEVICES may differ",
    docker="docker run --env-file gang.env …, the same file on every machine",
    compose="env_file: gang.env, the same for every part",
    kubernetes="one ConfigMap for all pods, with envFrom",
)


# Checkpoint and disks

SAME_CHECKPOINT = Fix(
    host="rsync --checksum -a the checkpoint from one part to the others, or share it",
    kubernetes="one ReadOnlyMany volume for all pods",
)
HUB = Fix(
    host="set https_proxy or HF_ENDPOINT (a mirror), or copy a filled cache here and set HF_HOME to it",
    docker="docker run -e https_proxy=… or -e HF_ENDPOINT=…, or -v /hub:/hub -e HF_HOME=/hub with a filled cache",
    kubernetes="let the pods reach the hub (NetworkPolicy, https_proxy, HF_ENDPOINT), or fill the volume of HF_HOME",
)
HUB_TOKEN = Fix(
    host="accept the terms on the model's page, and set HF_TOKEN to a token of that account",
    docker="accept the terms on the model's page, and docker run -e HF_TOKEN=hf_…",
    compose="accept the terms on the model's page, and HF_TOKEN=hf_… docker compose up",
    kubernetes="accept the terms on the model's page, and put a token into the entry hf-token of the secret rtp-llm",
)
HUB_CACHE = Fix(
    host="remove models that you do not need (hf cache), or set HF_HOME to a larger disk",
    docker="docker run -v /large/disk:/hub -e HF_HOME=/hub …",
    compose="HUB_DIR=/large/disk docker compose up",
    kubernetes="enlarge the volume claim of HF_HOME",
)
DISK_SPACE = Fix(
    host="free some space, or set TMPDIR and RTP_RUN_DIR to another disk",
    docker="docker run --tmpfs /tmp:size=2g …",
    compose="tmpfs: [/tmp:size=2g]",
    kubernetes="mount an emptyDir {sizeLimit: 2Gi} at /tmp",
)


def checkpoint_path(path: str) -> Fix:
    return Fix(
        host=f"CHECKPOINT_PATH={path}",
        docker=f"docker run -v {path}:{path}:ro -e CHECKPOINT_PATH={path} …",
        compose=f'volumes: ["{path}:{path}:ro"] and CHECKPOINT_PATH: {path}',
        kubernetes=f"mount the volume that holds the model, and set CHECKPOINT_PATH={path}",
    )


def readable_by(uid: int, gid: int, path: str) -> Fix:
    return Fix(
        host=f"chmod -R a+rX {path}",
        docker=f"docker run --user {uid}:{gid} …, or on the host: chmod -R a+rX {path}",
        compose=f'user: "{uid}:{gid}", or on the host: chmod -R a+rX {path}',
        kubernetes=f"securityContext: {{fsGroup: {gid}}}",
    )


def writable_folder(folder: str) -> Fix:
    return Fix(
        host=f"make {folder} writable, or set TMPDIR to a writable folder",
        docker="docker run --tmpfs /tmp:exec …",
        compose="tmpfs: [/tmp:exec]",
        kubernetes="mount an emptyDir at /tmp",
    )


# Shared memory

SHM_MOUNT = Fix(
    host="mount -t tmpfs -o size=2G,mode=1777 tmpfs /dev/shm",
    docker="docker run --shm-size=2g …, and mount nothing else at /dev/shm",
    compose="shm_size: 2gb, and mount nothing else at /dev/shm",
    kubernetes="mount an emptyDir {medium: Memory, sizeLimit: 2Gi} at /dev/shm; its owner: securityContext.fsGroup",
)
CUMEM_HOST = Fix(
    host="NCCL_CUMEM_HOST_ENABLE=0",
    docker="docker run --cap-add SYS_NICE …, or -e NCCL_CUMEM_HOST_ENABLE=0",
    compose="cap_add: [SYS_NICE]",
    kubernetes="securityContext: {capabilities: {add: [SYS_NICE]}}",
)


def shm_size(gib: int) -> Fix:
    return Fix(
        host=f"mount -o remount,size={gib}G /dev/shm",
        docker=f"docker run --shm-size={gib}g …",
        compose=f"shm_size: {gib}gb",
        kubernetes=f"volumes: [{{name: shm, emptyDir: {{medium: Memory, sizeLimit: {gib}Gi}}}}], mounted at /dev/shm",
    )


def orphaned_files(num_ours: int) -> Fix:
    """Returns how to remove the files in /dev/shm that no process uses any more. `num_ours`: how many of them provably
    belong to this server, so that `rtp-llm-doctor --fix shm` removes them.
    """
    remove = f"rtp-llm-doctor --fix shm removes {num_ours} of them that are provably this server's; " * bool(num_ours)
    return Fix(
        host=f"{remove}remove the files that you do not need",
        docker=f"{remove}recreate the container",
        compose=f"{remove}docker compose up --force-recreate",
        kubernetes=f"{remove}delete the pod: an emptyDir outlives its containers",
    )


# Limits and permissions

LOCKED_MEMORY = Fix(
    host="ulimit -l unlimited",
    docker="docker run --ulimit memlock=-1 --cap-add IPC_LOCK …",
    compose="ulimits: {memlock: -1} and cap_add: [IPC_LOCK]",
    kubernetes="securityContext: {capabilities: {add: [IPC_LOCK]}}, and memlock in the container runtime's unit",
)
OPEN_FILES = Fix(
    host="ulimit -n 1048576",
    docker="docker run --ulimit nofile=1048576:1048576 …",
    compose="ulimits: {nofile: {soft: 1048576, hard: 1048576}}",
    kubernetes="raise LimitNOFILE in the container runtime's unit",
)
SECCOMP = Fix(
    host="remove the seccomp filter or limit that forbids threads",
    docker="upgrade Docker to 20.10.10 or newer; to confirm the cause: --security-opt seccomp=unconfined",
    kubernetes="upgrade the container runtime and libseccomp",
)
STACK_SIZE = Fix(
    host="ulimit -s 8192", docker="docker run --ulimit stack=8388608 …", compose="ulimits: {stack: 8388608}"
)
USER_NAME = Fix(
    host="export USER=rtp",
    docker="docker run -e USER=rtp -e HOME=/tmp …",
    compose="environment: {USER: rtp, HOME: /tmp}",
    kubernetes="env: [{name: USER, value: rtp}, {name: HOME, value: /tmp}]",
)


def num_threads(count: int) -> Fix:
    return Fix(
        host=f"systemd-run -p TasksMax={count} …, or ulimit -u {count}",
        docker="docker run --pids-limit=-1 …",
        compose="pids_limit: -1",
        kubernetes="raise podPidsLimit of the kubelet",
    )


def memory_limit(num_bytes: int) -> Fix:
    gib = -(-num_bytes // (1 << 30))
    return Fix(
        host=f"raise the limit to {gib}G",
        docker=f"docker run --memory={gib}g …",
        compose=f"mem_limit: {gib}gb",
        kubernetes=f"resources.limits.memory: {gib}Gi",
    )


def cpu_cores(count: int) -> Fix:
    return Fix(
        host=f"taskset, or cpuset, with {count} cores",
        docker=f"docker run --cpus={count} …",
        compose=f"cpus: {count}",
        kubernetes=f"resources: {{requests: {{cpu: {count}}}}} and no CPU limit",
    )


# GPUs

GPU_ACCESS = Fix(
    host="install NVIDIA's driver; nvidia-smi must list the GPUs",
    docker="docker run --gpus all …",
    compose="deploy.resources.reservations.devices: [{driver: nvidia, count: all, capabilities: [gpu]}]",
    kubernetes="resources.limits: {nvidia.com/gpu: N}, and the runtime class of the GPU operator",
)
RECREATE_CONTAINER = Fix(
    host="run nvidia-smi to see the error; restart the driver, or reboot",
    docker="recreate the container; with cgroup v2 use CDI (--device nvidia.com/gpu=all)",
    compose="docker compose up --force-recreate",
    kubernetes="delete the pod",
)
REBOOT = Fix(host="reboot", docker="restart the container; if that does not help, reboot the host")
UVM_DEVICE = Fix(
    host="nvidia-modprobe -u -c=0",
    docker="on the host: nvidia-modprobe -u -c=0, then recreate the container with --gpus all",
    kubernetes="on the node: nvidia-modprobe -u -c=0 (the device plugin mounts /dev/nvidia-uvm)",
)


def fewer_ranks(num_gpus: int, num_ranks: int) -> Fix:
    return Fix(
        host=f"set TP_SIZE={num_gpus}, or add parts and set LOCAL_WORLD_SIZE={num_gpus}",
        docker=f"docker run --gpus all …, or TP_SIZE={num_gpus}",
        compose=f"devices: [{{driver: nvidia, count: all, capabilities: [gpu]}}], or TP_SIZE={num_gpus}",
        kubernetes=f"resources.limits: {{nvidia.com/gpu: {num_ranks}}}, or TP_SIZE={num_gpus}",
    )


def free_gpu(index: int) -> Fix:
    return Fix(
        host=f"stop the owner (fuser -v /dev/nvidia{index}), or choose other GPUs with CUDA_VISIBLE_DEVICES",
        docker=f"on the host: fuser -v /dev/nvidia{index}, docker ps; stop the owner",
        kubernetes="find the pod that shares this GPU, or a process that outlived its pod",
    )


# Network

LOCAL_ADDRESS = Fix(
    host="write an address of this machine into the member list",
    docker="docker run --network host …",
    compose="network_mode: host, or one compose network for all parts and their service names in the list",
    kubernetes="the pod's own address in the list (a headless Service), or hostNetwork: true",
)
RDMA_CARDS = Fix(
    host="connect the cards to the network, or NCCL_IB_DISABLE=1",
    docker="docker run --device /dev/infiniband --ulimit memlock=-1 --cap-add IPC_LOCK …, or -e NCCL_IB_DISABLE=1",
    compose='devices: ["/dev/infiniband"], or NCCL_IB_DISABLE: 1',
    kubernetes="request the RDMA device plugin's resource, or NCCL_IB_DISABLE=1",
)
NCCL_HOSTID = Fix(
    host="run both parts in one container, or set another NCCL_HOSTID on each",
    docker="one container for both, or --ipc=host --pid=host --gpus all, or another -e NCCL_HOSTID on each",
    kubernetes="one pod per machine, or another NCCL_HOSTID per pod",
)


def other_start_port(stop_owner: str, port: int, same_in_list: str) -> Fix:
    """Returns how to free a port that another process uses, or to change START_PORT instead.

    `stop_owner`: text that says how to stop that process. `port`: the proposed START_PORT. `same_in_list`: text that
    tells the user to change the port in the member list as well; empty if there is no such list.
    """
    return Fix(
        host=f"{stop_owner}, or START_PORT={port}{same_in_list}",
        docker=f"{stop_owner}, or docker run -e START_PORT={port} -p {port}:{port} …{same_in_list}",
        compose=f"{stop_owner}, or START_PORT: {port}{same_in_list}",
        kubernetes=f"with hostNetwork another pod has it: START_PORT={port}{same_in_list}",
    )


def resolvable_name(name: str) -> Fix:
    return Fix(
        host=f"add {name} to /etc/hosts, or write its address into the member list",
        docker=f"docker run --add-host {name}:<address> …, or write the address into the member list",
        compose=f'extra_hosts: ["{name}:<address>"]',
        kubernetes="a headless Service with publishNotReadyAddresses: true, or hostAliases",
    )


def name_without_loopback(name: str) -> Fix:
    return Fix(
        host=f"correct the line of {name} in /etc/hosts",
        docker=f"docker run --add-host {name}:<its address> …",
        compose=f'extra_hosts: ["{name}:<its address>"]',
        kubernetes=f"hostAliases: [{{ip: <its address>, hostnames: [{name}]}}]",
    )


def start_part(world_rank: int) -> Fix:
    return Fix(
        host=f"start the part, with WORLD_RANK={world_rank}, or run `rtp-llm-doctor gang` on its machine as well",
        kubernetes="kubectl get pods -o wide: is the part's pod Pending?",
    )


def free_doctor_port(part: int, port: int) -> Fix:
    other = f"give part{part} another START_PORT, in its settings and in the member list"
    return Fix(
        host=f"on part{part}'s machine: `ss -ltnp sport = :{port}` shows the process: stop it, or {other}",
        kubernetes=f"with hostNetwork another pod has port {port} of part{part}'s machine: move it, or {other}",
    )


def open_ports(part: int, ports: str, source: str) -> Fix:
    """Returns how to open TCP ports of a part. `ports`: comma-separated; `source`: IP address that connects to them."""
    return Fix(
        host=f"on part{part}'s machine: open tcp {ports} from {source}",
        docker=f"docker run --network host …, and open tcp {ports} on part{part}'s machine",
        compose=f"network_mode: host, and open tcp {ports} on part{part}'s machine",
        kubernetes=f"allow tcp {ports} between the gang's pods in the NetworkPolicy",
    )


def open_ephemeral_ports(low: str, high: str, source: str) -> Fix:
    narrow = 'net.ipv4.ip_local_port_range="50000 51000"'
    return Fix(
        host=f"open tcp {low}:{high} from {source}, or narrow the range (sysctl -w {narrow}) and open that",
        docker=f"open tcp {low}:{high} between the machines, or docker run --sysctl {narrow} … and open that",
        kubernetes=f"allow tcp {low}-{high} (endPort) between the gang's pods in the NetworkPolicy",
    )
