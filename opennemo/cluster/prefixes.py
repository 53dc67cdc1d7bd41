"""Ray Serve's side of the router: Ray names the replicas, routing.py chooses one for a request.

Ray makes one in each process that has a handle, asks it about every call, and reports when a call
has ended. The rest stays Ray's: it notices lost replicas, leaves out those that are full or being
replaced, and holds calls until one is free.
"""

# Ray is an extra, which few users install.
# pyright: reportMissingImports=false
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from opennemo.cluster.routing import Router


class Prefixes(RequestRouter):
    """Routes calls of (token ids, salt, ...) by their beginning; others go to any free replica."""

    def initialize_state(self, **_: object) -> None:
        self._router = Router()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._tell()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The best replica by itself, then the others, in case that it is full."""
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # when all are full: wait, then ask
        request, ids, salt = _parts(pending_request)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        best = by_name.get(self._router.choose(request, ids, salt, among=by_name))
        # Ray never reports the end of a call that is given up before it has a replica.
        pending_request.future.add_done_callback(
            lambda future: self._router.finish(request) if future.cancelled() else None
        )
        others = [replica for replica in candidate_replicas if replica is not best]
        return [[best], others] if best else [others]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        if pending_request.args:  # it may have gone to one of the others
            request, ids, salt = _parts(pending_request)
            if self._router.place(request) != replica_id.unique_id:
                self._router.choose(request, ids, salt, among=[replica_id.unique_id])

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._router.finish(internal_request_id)

    def _tell(self) -> None:
        self._router.update(
            {
                id.unique_id: replica.routing_stats.get("n_tokens")
                for id, replica in self.curr_replicas.items()
            }
        )


def _parts(pending: PendingRequest) -> tuple[str, list[int], bytes]:
    ids, salt = pending.args[:2]
    return pending.metadata.internal_request_id, ids, salt
